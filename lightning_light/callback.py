"""Define the base class of compression callbacks: early refusals, state in checkpoints, surgery followed."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from typing_extensions import override

from lightning_light.errors import LightningLightError, NoEffectWarning
from lightning_light.event_log import HISTORY, History, add_event, event_text
from lightning_light.helper_networks import first_call, frozen_parts, helper_networks
from lightning_light.host.classes import Callback
from lightning_light.host.patches import InstancePatch, wrap_method
from lightning_light.host.random_state import RunPosition
from lightning_light.host.strategy import read_sharded_checkpoint, rebuild_ddp
from lightning_light.host.trainer import callbacks_of, is_restoring, shards_parameters
from lightning_light.int8 import Int8Weights
from lightning_light.isolation import FORWARD_ERRORS
from lightning_light.order import check_order
from lightning_light.planning import plan
from lightning_light.progress import (
    epochs_planned,
    steps_before_epochs,
    steps_done,
    time_before_epochs,
    training_progress,
)
from lightning_light.surgery.attachment import attach, detach, has_state, record, release, state_of
from lightning_light.surgery.averaged_models import averaged_models_of, check_averaged_models
from lightning_light.surgery.checkpoint_monitoring import reset_monitoring
from lightning_light.surgery.distributed import check_agreement, log_rank_zero, refuse_sharding, refuse_unsupported
from lightning_light.surgery.manifest import naming_file, register_state
from lightning_light.surgery.optimizer import check_optimizers
from lightning_light.surgery.state import CompressionState
from lightning_light.terminal import above_progress_bar

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn

    from lightning_light.example_input import ExampleInput

__all__ = ["CompressionCallback"]

T = TypeVar("T")

register_state(HISTORY, History)


class CompressionCallback(Callback):
    """Base class of every method: decides when to act and keeps its state in the module's compression state.

    A subclass names its `method` and `stage`, keeps its progress in `state`, changes the network only at
    ``on_train_batch_start``, and calls ``_after_surgery`` when it has changed shapes or modules. Not at
    ``on_train_epoch_start``: a run that is resumed from the last step of an epoch, or from its middle, does not call
    it. Not at ``on_train_epoch_end``: a checkpoint would pair the new weights with the old metric. It does not use
    ``state_dict``: Lightning loads the weights before a callback's state, and a weights-only checkpoint has no
    callback state at all.

    A subclass that overrides ``setup``, ``on_fit_start``, ``on_train_start`` or ``teardown`` calls ``super()`` first.
    """

    method: ClassVar[str]
    """Key of the method's state in a checkpoint and prefix of its log keys, such as ``structured_pruning``."""

    stage: ClassVar[int]
    """Position in a chain of methods, one of `lightning_light.order.Stage`."""

    structural: ClassVar[bool] = True
    """Whether shapes or modules change during a run, which some strategies and optimizers cannot follow."""

    whole_parameters: ClassVar[tuple[str, str] | None] = None
    """Why the method needs parameters that no strategy shards, and what to do instead; None if it does not."""

    state_schema: ClassVar[Any] = dict[str, Any]
    """What `state` may hold, a `TypedDict` with ``total=False``: checked whenever a checkpoint is loaded."""

    _key: str | None = None
    _attached: bool = False
    # Not annotated: jsonargparse resolves the annotations of all bases in the module of a subclass that is a dataclass.
    _run_position = cast("RunPosition | None", None)
    _loading = cast("InstancePatch | None", None)

    @override
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the schema of the method's state."""
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "method"):
            register_state(cls.method, cls.state_schema)

    @override
    def __repr__(self) -> str:
        """The call that makes an equal callback: arguments that are not at their defaults; a network by its class."""
        parameters = [p for name, p in inspect.signature(type(self).__init__).parameters.items() if name != "self"]
        given = [(p.name, getattr(self, p.name)) for p in parameters if hasattr(self, p.name)]
        defaults = {p.name: p.default for p in parameters}
        return f"{type(self).__name__}({', '.join(f'{n}={_written(v)}' for n, v in given if v != defaults[n])})"

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse unsupported settings, and attach the compression state before a checkpoint is loaded."""
        self.refuse_strategy(trainer)
        peers = _peers(trainer)
        check_order([(type(peer).__name__, peer.stage, peer.window(epochs_planned(trainer))) for peer in peers])
        key = type(self).method  # the class's: an argument may have the same name
        place = [id(peer) for peer in peers if type(peer).method == key].index(id(self)) + 1
        self._key = key if place == 1 else f"{key}#{place}"
        self._run_position = RunPosition() if peers[-1] is self else None  # the last restores after all others
        self._attached = not has_state(pl_module)
        attach(pl_module)
        if shards_parameters(trainer):
            self._check_before_loading(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the optimizers the parameters that their stored state belongs to, before it is loaded."""
        if self.structural:
            check_optimizers(trainer.optimizers)
            if not is_restoring(trainer):  # else copies follow the checkpoint
                check_averaged_models(trainer, pl_module)
        state = attach(pl_module)
        state.reconcile(trainer.optimizers, pl_module, resuming=is_restoring(trainer))
        if self._run_position is not None:
            if is_restoring(trainer):  # all callbacks have added their parameters
                state.require_parameters(trainer.optimizers)
            self._run_position.before_first_epoch(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue with the batch that the interrupted run would have used next."""
        if self._run_position is not None:
            self._run_position.after_loaders_started(trainer)
            if trainer.fast_dev_run and trainer.is_global_zero:  # type: ignore[attr-defined]
                _log_plan(trainer, pl_module)
            elif sentence := steps_before_epochs(trainer):
                log_rank_zero(trainer, sentence)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the random state from which the loader starts; warn once if ``max_time`` will end the run early."""
        if self._run_position is not None:
            if sentence := time_before_epochs(trainer):
                warnings.warn(sentence, stacklevel=2)
            self._run_position.before_epoch(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random states and the position in the training data."""
        if self._run_position is not None:
            self._run_position.save(trainer, checkpoint)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the random states; they are restored when a run goes on from the checkpoint."""
        if self._run_position is not None:
            self._run_position.load(trainer, checkpoint)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the method found nothing to do."""
        reason = None if getattr(trainer, "fast_dev_run", False) else self._no_effect_reason(pl_module)
        if reason is not None:
            self._no_effect(reason)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing but what lets ``trainer.save_checkpoint()`` after the run keep the manifest."""
        if stage == "fit":
            self._warn_if_ended_early(trainer)
        release(pl_module)
        if self._loading is not None:
            self._loading.undo()

    def _check_before_loading(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a checkpoint before shards are loaded; the module's own hook is called after that."""

        def check(load: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
            with naming_file(path):
                state_of(pl_module).refuse_other_structure(pl_module, read_sharded_checkpoint(path))
            return load(path, *args, **kwargs)

        self._loading = wrap_method(trainer.strategy, "load_checkpoint", check)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the module, since Lightning calls no teardown after an error; undo all after an early refusal."""
        self.teardown(trainer, pl_module, "exception")
        peers = _peers(trainer)
        untouched = steps_done(trainer) == 0 and not state_of(pl_module).edit_log
        if peers[-1] is self and untouched and any(peer._attached for peer in peers):
            detach(pl_module)

    # For subclasses.

    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From when to when the network changes, as fractions of the run; None: not during training."""
        return None

    def last_change(self, max_epochs: int | None) -> float | None:
        """When the method has done what it is to do, as a fraction of the run: the end of its window, or before."""
        window = self.window(max_epochs)
        return None if window is None else window[1]

    def refuse_strategy(self, trainer: Trainer) -> None:
        """Refuse, in ``setup``, a strategy that the method cannot follow."""
        if self.whole_parameters is not None:
            refuse_sharding(trainer, type(self).__name__, *self.whole_parameters)
        if self.structural:
            refuse_unsupported(trainer, type(self).__name__)

    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Do to a copy of the network what the method will have done at the end of its window, for `plan`.

        Args:
            model: the copy, as the methods before this one leave it; it may be changed.
            example: one call of it.
            batches: of training; none where only an example is known.

        Returns:
            A line ``layer: what happens to it`` for each layer, also for those left alone, with the reason.
        """
        return []

    def int8_weights(self) -> Int8Weights | None:
        """What weights will be rounded to for int8 kernels; None: this method does not round them."""
        return None

    def compression_state(self, pl_module: nn.Module) -> CompressionState:
        """The module's compression state: the edit log of structural changes, and the state of every method."""
        return state_of(pl_module) if has_state(pl_module) else attach(pl_module)

    def state(self, pl_module: nn.Module) -> dict[str, Any]:
        """This method's part of the compression state: plain types and tensors, in every checkpoint of the module.

        Restored with the weights, also from a weights-only checkpoint. Read it again in every hook: loading a
        checkpoint replaces it.
        """
        return self.compression_state(pl_module).state.setdefault(self._key or type(self).method, {})

    def resumed(self, pl_module: nn.Module) -> bool:
        """Whether this ``fit`` continues from a checkpoint with a compression state; from ``on_fit_start`` on."""
        return self.compression_state(pl_module).resumed

    def claim(self, pl_module: nn.Module, layers: Iterable[str], *, follows_cuts: bool = False) -> None:
        """Claim ``layers`` for this method; surgery then refuses them to methods that come earlier in a chain.

        Claim when layers are changed, not in ``on_fit_start``: an earlier method of this run may still change them.

        Args:
            pl_module: the live module.
            layers: names of modules.
            follows_cuts: whether ``on_surgery`` keeps what belongs to the layers right when channels are cut.

        Raises:
            UnsupportedError: a later method owns one of the layers.
        """
        key = self._key or type(self).method
        self.compression_state(pl_module).claim(pl_module, key, self.stage, layers, follows_cuts=follows_cuts)

    def disclaim(self, pl_module: nn.Module) -> None:
        """Give up this method's claim, when it keeps nothing for the layers any more."""
        self.compression_state(pl_module).disclaim(self._key or type(self).method)

    def before_surgery(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what this method compares with later: a method of this Trainer is about to change the network.

        Called on every method, at each change, on every rank; see `CompressionState.reference`.
        """

    def on_surgery(
        self, trainer: Trainer, pl_module: LightningModule, kept: Mapping[str, Mapping[int, Tensor]] | None
    ) -> None:
        """Follow a change of structure that a method of this Trainer, maybe this one, has just made.

        Args:
            trainer: the Trainer.
            pl_module: the live module, changed.
            kept: tensor name -> dimension -> positions that stayed; None where modules were replaced instead.
        """

    def changed_before(self, trainer: Trainer) -> bool:
        """Check whether another method of this Trainer changes shapes or modules before this one."""
        return any(peer.structural and peer.stage <= self.stage for peer in _peers(trainer) if peer is not self)

    def _before_surgery(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let every method of this Trainer measure its references; call it on every rank before a change."""
        for peer in _peers(trainer):
            peer.before_surgery(trainer, pl_module)

    def _after_surgery(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        entry: Mapping[str, Any],
        summary: str,
        *,
        part: str = "",
        kept: Mapping[str, Mapping[int, Tensor]] | None = None,
    ) -> None:
        """Let everything that refers to the network follow: checkpoints, averaged copies, DDP, compiled code.

        Call it once per event, on every rank, after the optimizers and the averaged models have been changed along with
        the live module.

        Args:
            trainer: the Trainer.
            pl_module: the live module, changed.
            entry: what the edit log records: plain types under the name of a registered operation.
            summary: what has happened, for the log line.
            part: as in `log_event`.
            kept: for ``channels``: tensor name -> dimension -> positions that stayed.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in pl_module.named_parameters()}
        decided = {name: dict(dims) for name, dims in (kept or {}).items()}
        check_agreement(trainer, f"what `{type(self).__name__}` did", [dict(entry), decided, shapes])
        record(pl_module, averaged_models_of(trainer, pl_module), entry, kept)
        for peer in _peers(trainer):
            peer.on_surgery(trainer, pl_module, kept)
        rebuild_ddp(trainer)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # else the ninth shape falls back to eager code without a word
        reset_monitoring(trainer)
        self.log_event(trainer, pl_module, summary, part=part)

    def options_as(self, kind: Callable[..., T]) -> T:
        """Return the options ``kind``, a dataclass: the arguments of this callback of the same names."""
        return kind(**{name: getattr(self, name) for name in inspect.signature(kind).parameters})

    def log_scalars(self, trainer: Trainer, scalars: Mapping[str, float]) -> None:
        """Log each of ``scalars`` as ``method/name`` to every logger, at the present step."""
        named = {f"{type(self).method}/{name}": value for name, value in scalars.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=steps_done(trainer))

    def log_event(self, trainer: Trainer, pl_module: LightningModule, summary: str, *, part: str = "") -> None:
        """Log one line, and keep it in the history that every checkpoint holds. Call it on every rank.

        A line that the method repeats is logged at the level ``DEBUG``, and not kept again.

        Args:
            trainer: the Trainer.
            pl_module: the live module.
            summary: what has happened, in at most about 60 characters.
            part: which event of the run it is: ``"4/10"``.
        """
        event = {"step": steps_done(trainer), "epoch": trainer.current_epoch, "method": type(self).method}
        event |= {"summary": summary, **({"part": part} if part else {})}
        add_event(self.compression_state(pl_module).state, event)
        log_rank_zero(trainer, event_text(event), once=True)

    def _warn_if_ended_early(self, trainer: Trainer) -> None:
        """Warn if ``max_time`` or early stopping ended the run before the last change."""
        last = self.last_change(epochs_planned(trainer))
        if not trainer.should_stop or last is None or (done := training_progress(trainer)) >= last:
            return
        warnings.warn(
            f"`{type(self).__name__}`: expected the run to go on until its last change, at {last:.0%} of the planned "
            f"steps; found that it was stopped at {done:.0%}, by `max_time`, early stopping or `trainer.should_stop`. "
            "The method is not complete: resume from the last checkpoint, or plan a shorter run with `max_epochs` or "
            "`max_steps`.",
            stacklevel=2,
        )

    def _helper_networks(self, trainer: Trainer, pl_module: LightningModule, batch: Any = None) -> list[str] | None:
        """Name the frozen networks that are left alone, and log them; None as long as a batch is needed to tell.

        A module whose step cannot be run alone has none.
        """
        parts, example = frozen_parts(pl_module), first_call(pl_module, batch)
        if parts and example is None:
            return None
        try:
            found = helper_networks(pl_module, example)
        except FORWARD_ERRORS as error:
            log_rank_zero(trainer, f"{type(self).method}: {parts} are frozen, and not left alone ({error})")
            return []
        if found:
            log_rank_zero(trainer, f"{type(self).method}: left alone, frozen and only used to train: {found}")
        return found

    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        """Why the run changed nothing, for a warning at its end; None if that is no surprise."""
        return None

    def _no_effect(self, reason: str) -> None:
        """Warn that the method found nothing to do, by name and with the reason."""
        with above_progress_bar():
            warnings.warn(f"`{type(self).__name__}` had no effect: {reason}", NoEffectWarning, stacklevel=2)


def _log_plan(trainer: Trainer, pl_module: LightningModule) -> None:
    """Log, in a run of one batch, what the whole run would do."""
    given = trainer.train_dataloader if pl_module.example_input_array is None else pl_module.example_input_array
    epochs = epochs_planned(trainer) or 1
    length = f" of {epochs} epochs" if epochs > 1 else ""
    try:
        planned = plan(pl_module, given, _peers(trainer), max_epochs=epochs if epochs > 1 else None)
    except (LightningLightError, *FORWARD_ERRORS) as error:
        log_rank_zero(trainer, f"fast_dev_run: the whole run{length} cannot be planned: {error}")
    else:
        log_rank_zero(trainer, f"fast_dev_run: the whole run{length} would do this\n{planned}")


def _written(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__}(...)" if isinstance(value, torch.nn.Module) and "\n" in text else text


def _peers(trainer: Trainer) -> list[CompressionCallback]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, CompressionCallback)]
