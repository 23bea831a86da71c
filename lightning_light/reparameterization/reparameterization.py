"""`Reparameterization`: expand convolutions to parallel branches while the network trains, and merge them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.errors import OrderError
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import plural
from lightning_light.helper_networks import first_call
from lightning_light.host.trainer import callbacks_of
from lightning_light.order import Stage
from lightning_light.progress import epochs_planned
from lightning_light.reparameterization.apply import (
    METHOD,
    Expansion,
    Merged,
    branched_layers,
    expand_layers,
    merge_layers,
    merged_tensors,
    plan_expansion,
)
from lightning_light.reparameterization.forms import Form
from lightning_light.schedules import resolve_moment
from lightning_light.schema import LayerName
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.distributed import broadcast, log_rank_zero
from lightning_light.targets import Targets, as_targets
from lightning_light.timing import is_due
from lightning_light.validation import Moment, NonNegativeFloat, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

__all__ = ["Reparameterization"]


class _State(TypedDict, total=False):
    """What a checkpoint holds of a run.

    Attributes:
        expanded: whether the expansion of this run is done.
        merged: whether the merging of this run is done.
        layers: names of the convolutions that were expanded, in all fits.
    """

    expanded: bool
    merged: bool
    layers: list[Annotated[str, LayerName()]]


@validated
@dataclass(eq=False, repr=False)
class Reparameterization(CompressionCallback):
    """Train convolutions as several parallel branches, and merge them into one convolution for deployment.

    A convolution becomes the sum of itself and of branches, each of which ends with a batch norm or a scale. Expansion
    preserves the function at whatever time it happens, because that starts at zero. Merging is exact in evaluation
    mode. What is deployed has the layers it had before, at no cost.

    Branches are merged at ``merge``; by default when the first later method of the Trainer that needs one weight per
    layer begins (lighter operators, masks, factors, clustering, quantization). Without such a method they stay until
    `merge_branches` is called, and `MobileExport` merges them in the copy that it exports. Channels may be pruned while
    there are branches; budgets count the merged layers.

    Example:
        >>> from lightning_light.reparameterization import ACB
        >>> Reparameterization(ACB(), start=0.1, merge=0.8)
        Reparameterization(form=ACB(), start=0.1, merge=0.8)

    Args:
        form: which branches: `ACB`, `RepVGG`, `Branches`, `DBB`, `OREPA`.
        targets: layers to expand, all convolutions by default: patterns or `Targets`.
        start: when they are expanded; an int is an epoch, a float a fraction of the run.
        merge: when they are merged, or None; 1.0 is before the last batch.
        initial_scale: learned scale per output channel of each branch, the weight of its last batch norm, when it is
            added. Zero preserves the function. In training from scratch the authors of the forms start with 1, where
            each branch is normalized and the convolution itself is too; here it is not.

    Raises:
        TypeError: an argument has the wrong type; at construction.
        ValueError: an argument is out of range, or ``merge`` does not come after ``start``.
        OrderError: the branches are merged after a later method begins.
        TargetError: ``targets`` match no layer.
        UnsupportedError: a strategy or launcher that cannot follow, or a layer that a later method has changed.

    Note:
        Convolutions that cannot be expanded (transposed, shared, parametrized, frozen, part of a block that merges
        itself, ...) are left alone; the log has the reasons. The new parameters are in the optimizer group of the
        weight of their convolution.
    """

    method: ClassVar[str] = METHOD
    stage: ClassVar[int] = Stage.REPARAMETERIZATION
    state_schema: ClassVar[Any] = _State

    form: Form
    _: KW_ONLY
    targets: Targets | str | list[str] | None = None
    start: Moment = 0.0
    merge: Moment | None = None
    initial_scale: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        start, merge = self.start, self.merge
        if merge is not None and type(start) is type(merge) and merge <= start:
            raise ValueError(
                f"`Reparameterization(start={start}, merge={merge})`: expected branches to be merged after they are "
                f"expanded, found `merge` at or before `start`. Give a later `merge`, or None."
            )
        self._window = (0.0, 1.0)
        self._merges = merge is not None

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out when the branches have to be merged, and refuse a time that is too late."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._window = self._resolved(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse targets that match nothing, before anything is trained."""
        super().on_fit_start(trainer, pl_module)
        state = self.state(pl_module)
        if not self.resumed(pl_module):
            for done in ("expanded", "merged"):
                state.pop(done, None)
        as_targets(self.targets).select(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Expand or merge before the batch, so that no checkpoint pairs new weights with an old metric."""
        state = self.state(pl_module)
        if not state.get("expanded") and is_due(trainer, self._window[0]):
            self._expand(trainer, pl_module, batch)
            state["expanded"] = True
        if self._merges and not state.get("merged") and is_due(trainer, self._window[1]):
            self._merge(trainer, pl_module)
            state["merged"] = True

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        return None if self.state(pl_module).get("expanded") else f"the run ended before `start={self.start!r}`."

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From the expansion to the merging, as far as the arguments determine it."""
        end = 1.0 if self.merge is None else resolve_moment(self.merge, max_epochs, repr(self))
        return resolve_moment(self.start, max_epochs, repr(self)), end

    @override
    def last_change(self, max_epochs: int | None) -> float | None:
        return (self.window(max_epochs) or (0.0, 1.0))[0 if self.merge is None else 1]

    @override
    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Plan the branches; merged, the network has the layers that it had."""
        plan = plan_expansion(model, self.form, as_targets(self.targets), example=example)
        lines = [f"{name}: expanded by {len(branches)} while it trains" for name, branches in plan.layers.items()]
        return lines + [f"{name}: left alone ({reason})" for name, reason in plan.skipped.items()]

    # Private: when the hooks act.

    def _resolved(self, trainer: Trainer) -> tuple[float, float]:
        start, end = self.window(epochs_planned(trainer)) or (0.0, 1.0)
        follower = self._first_follower(trainer)
        self._merges = self.merge is not None or follower is not None
        if follower is not None:
            begins, name, precedes = follower
            end = begins if self.merge is None else end
            if end > begins or (precedes and end == begins):
                raise OrderError(
                    f"`{self!r}` beside `{name}`: expected branches to be merged before it begins at {begins:.0%} of "
                    f"the run, because it needs one weight per layer; found {end:.0%}"
                    f"{', and it comes first in `callbacks`' if precedes and end == begins else ''}. Put "
                    "`Reparameterization` first, and leave `merge` out."
                )
        if end <= start:
            raise ValueError(
                f"`{self!r}`: expected branches to be merged after they are expanded, found an expansion at "
                f"{start:.0%} and a merging at {end:.0%} of the run. Expand earlier, or let the methods that follow "
                "begin later."
            )
        return start, end

    def _first_follower(self, trainer: Trainer) -> tuple[float, str, bool] | None:
        """Return the first method that needs merged layers: its start, its name, whether the list has it before us."""
        callbacks = callbacks_of(trainer)
        found = [
            (window[0], type(peer).__name__, callbacks.index(peer) < callbacks.index(self))
            for peer in callbacks
            if isinstance(peer, CompressionCallback)
            if peer.stage == Stage.SUBSTITUTION or Stage.STRUCTURED < peer.stage < Stage.EXPORT
            if (window := peer.window(epochs_planned(trainer))) is not None
        ]
        return min(found, key=lambda item: (item[0], not item[2]), default=None)

    # Private: what they do.

    def _plan(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Expansion:
        """Plan, and try the layers in a forward pass of the module, or in its training step; decided on rank 0."""
        targets, example = as_targets(self.targets), first_call(pl_module, batch)
        plan = plan_expansion(pl_module, self.form, targets, optimizers=trainer.optimizers, example=example)
        return broadcast(trainer, plan)

    def _expand(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        plan = self._plan(trainer, pl_module, batch)
        if not plan.layers:
            if not branched_layers(pl_module):  # as of an earlier fit
                self._no_effect(f"{plan.summary()}.")
            return
        self._before_surgery(trainer, pl_module)
        entry = expand_layers(
            pl_module,
            plan.layers,
            initial_scale=self.initial_scale,
            optimizers=trainer.optimizers,
            averaged_models=averaged_models_of(trainer, pl_module),
        )
        state = self.state(pl_module)
        state["layers"] = [*state.get("layers", []), *plan.layers]
        self._after_surgery(trainer, pl_module, entry, f"expanded {plural(len(plan.layers), 'convolution')}")
        log_rank_zero(trainer, f"{self.method}: expanded {plan.summary()}", level=logging.DEBUG)

    def _merge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not branched_layers(pl_module):
            return
        self._before_surgery(trainer, pl_module)
        averaged_models = averaged_models_of(trainer, pl_module)
        copies = [merged_tensors(averaged_model, pl_module) for averaged_model in averaged_models]
        # The running statistics of the ranks differ, so that the merged weights would.
        decided: list[Merged] = broadcast(trainer, [merged_tensors(pl_module), *copies])
        entry = merge_layers(
            pl_module,
            decided[0],
            optimizers=trainer.optimizers,
            averaged_models=dict(zip(averaged_models, decided[1:], strict=True)),
        )
        self._after_surgery(trainer, pl_module, entry, f"merged {plural(len(decided[0]), 'convolution')}")
