"""Run a LightningModule's own ``validation_step`` with its network replaced by the exported file."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_light.errors import LightningLightError, ParityError, UnsupportedError
from lightning_light.export.copies import detached_copy
from lightning_light.export.evaluation import Evaluation, Evaluator, MetricInputs, PairedMetrics, outputs_and_labels
from lightning_light.export.inputs import Positional
from lightning_light.host.trainer import silent_loggers
from lightning_light.measure.metrics import MetricLike, local_copy, metrics_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ValidationEvaluator"]

_FAILURES = (LightningLightError, RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What a user's ``validation_step`` may raise because it does not run on the CPU, or without its Trainer's loop."""


@dataclass(frozen=True, eq=False)
class ValidationEvaluator(Evaluator):
    """Evaluates the Trainer's validation batches.

    ``validation_step`` is called on two copies of the module, on the CPU: in one, ``forward`` is a copy of the network,
    in the other the exported file. Metrics that the module holds are updated by the step itself. What the step logs is
    discarded.

    Args:
        trainer: that has validated; its validation loaders are iterated once more.
        module: the LightningModule.
        metrics: updated with (outputs of the step's last call of the module, labels of the batch); None for the
            metrics that the module holds.
        metric_inputs: the arguments of ``update``, if they are others.
        limit: validation batches per loader, at most.
        part: name of the submodule that the network is, in place of the module itself.
    """

    trainer: Trainer
    module: LightningModule
    metrics: MetricLike | None = None
    metric_inputs: MetricInputs | None = None
    limit: int | None = None
    part: str = ""

    @override
    def __call__(self, model: Callable[..., Any], file: Callable[..., Any], positional: Positional) -> Evaluation:
        of_model, of_file = (_Shell(self.trainer, self.module, self.part, network) for network in (model, file))
        if self.metrics is None:
            paired = PairedMetrics(of_model.metrics, of_file.metrics)
        else:
            paired = PairedMetrics.of(self.metrics)
        batches = 0
        with silent_loggers(self.trainer):
            try:
                for shell in (of_model, of_file):
                    shell.start()
                for batch, place in _batches(self.trainer, self.limit):
                    found = [shell.step(copy.deepcopy(batch), place) for shell in (of_model, of_file)]
                    self._update(paired, found, batch)
                    batches += 1
            except ParityError:  # a batch that lacks an input of the file
                raise
            except _FAILURES as error:
                return self._without_metrics(error)
        return paired.evaluation(batches)

    def _update(self, paired: PairedMetrics, outputs: list[list[Any]], batch: Any) -> None:
        of_model, of_file = outputs
        if not of_model or len(of_model) != len(of_file):
            raise UnsupportedError(
                f"expected `validation_step` of `{type(self.module).__name__}` to call the module, `self(...)`, found "
                "that it calls its parts"
            )
        if self.metrics is not None:
            inputs = self.metric_inputs or outputs_and_labels
            paired.update(inputs(of_model[-1], batch), inputs(of_file[-1], batch))
        for right, found in zip(of_model, of_file, strict=True):
            paired.update_agreement(right, found, batch)

    def _without_metrics(self, error: Exception) -> Evaluation:
        """Refuse if the user has asked for metrics; else warn."""
        message = (
            f"`MobileExport(metrics=...)`: expected to compute metrics by `validation_step` of "
            f"`{type(self.module).__name__}` on the CPU, with the network replaced by the file; found "
            f"{type(error).__name__}: {error}. Give the metrics and how they are updated, `metrics=..., "
            "metric_inputs=lambda outputs, batch: (...)`, or switch them off: `metric_batches=0`."
        )
        if self.metrics is not None:
            raise UnsupportedError(message) from error
        warnings.warn(message, stacklevel=2)
        return Evaluation()


class _Shell:
    """A copy of the LightningModule in which ``forward``, its own or of a part, is another network.

    Args:
        trainer: that the steps may read.
        module: the LightningModule.
        part: name of the submodule, empty for the module itself.
        network: called in place of ``forward``.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, part: str, network: Callable[..., Any]) -> None:
        self._module, self._network = detached_copy(module), network
        self._module.trainer = trainer  # a copy has none
        self._outputs: list[Any] = []
        self.metrics: dict[str, MetricLike] = {}
        for path in metrics_of(self._module):
            self.metrics[path] = self._replaced(path)
        network_part = self._module.get_submodule(part)
        for hooks in (network_part._forward_hooks, network_part._forward_pre_hooks):  # the network has them already
            hooks.clear()
        vars(network_part).update(forward=self._forward)
        vars(self._module).update(log=_ignored, log_dict=_ignored, all_gather=lambda data, *args, **kwargs: data)

    def start(self) -> None:
        """Call the hooks with which a validation starts."""
        self._module.on_validation_start()
        self._module.on_validation_epoch_start()

    def step(self, batch: Any, place: tuple[int, ...]) -> list[Any]:
        """Call ``validation_step``, and return the outputs of the network in it."""
        self._outputs = []
        self._module.validation_step(batch, *place)
        return self._outputs

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self._network(*args, **kwargs)
        self._outputs.append(output)
        return output

    def _replaced(self, path: str) -> MetricLike:
        """Replace a metric by one without state that is computed in this process alone."""
        owner, _, name = path.rpartition(".")
        fresh = local_copy(self._module.get_submodule(path))  # type: ignore[arg-type]
        self._module.get_submodule(owner).register_module(name, fresh)
        return fresh


def _batches(trainer: Trainer, limit: int | None) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """The validation batches on the CPU, in the Trainer's precision, and the indices that the step gets."""
    loaders = trainer.val_dataloaders
    listed = loaders if isinstance(loaders, list | tuple) else [] if loaders is None else [loaders]
    for number, (loader, most) in enumerate(zip(listed, trainer.num_val_batches, strict=False)):
        most = most if limit is None else min(most, limit)
        for index, batch in enumerate(loader):
            if index >= most:
                break
            converted = trainer.precision_plugin.convert_input(batch)
            moved = trainer.strategy.batch_to_device(converted, torch.device("cpu"), dataloader_idx=number)
            yield moved, (index, number) if len(listed) > 1 else (index,)


def _ignored(*args: Any, **kwargs: Any) -> None: ...
