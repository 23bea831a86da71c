"""Compare the outputs of a changed network with those of the network as it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.batch_norm import measure_statistics
from lightning_light.copies import copy_network
from lightning_light.criteria.output_distance import Distance, output_distance
from lightning_light.example_input import ExampleInput, example_of_batch
from lightning_light.isolation import isolated, plain_execution
from lightning_light.lowrank.calibration import first_batches
from lightning_light.nas.apply import apply_items
from lightning_light.nas.choices import Choices, Item
from lightning_light.nested import tensors_in
from lightning_light.quantization import Recipe, fake_quantized, quantize
from lightning_light.surgery.distributed import digest

__all__ = ["Evaluator", "Score", "split_batches"]

_DISTANCE_WEIGHT = 0.02


@dataclass(frozen=True)
class Score:
    """How far the outputs are from those of the network as it was.

    Attributes:
        distance: of the outputs, mean over the batches.
        changed: fraction of the predictions that have another most probable class.
    """

    distance: float
    changed: float

    @property
    def loss(self) -> float:
        """Return the score by which candidates are compared, ``changed + 0.02 * distance``.

        Far from the unchanged network the distance alone prefers outputs without confidence.
        """
        return self.changed + _DISTANCE_WEIGHT * self.distance


@dataclass(eq=False)
class Evaluator:
    """Carry out items on copies of a network, and compare the outputs; at most one copy exists at a time.

    Args:
        model: left as it is.
        example: one call of the model.
        space: the kinds of choices.
        calibration: calls on which batch-norm statistics are moved, and ranges of activations observed.
        evaluation: calls on which outputs are compared.
        distance: of the outputs.
        class_dim: which dimension counts classes.

    Raises:
        ValueError: an output of the network is not finite, or has no dimension ``class_dim``.
    """

    model: nn.Module
    example: ExampleInput
    space: Sequence[Choices]
    calibration: Sequence[ExampleInput]
    evaluation: Sequence[ExampleInput]
    distance: Distance = "kl"
    class_dim: int = -1

    def __post_init__(self) -> None:
        self.calibration, self.evaluation = list(self.calibration), list(self.evaluation)
        self._plain = self._outputs(self.model)
        self._check_outputs()
        self._statistics = measure_statistics(self.model, self.calibration)

    def changed(self, items: Iterable[Item], recipe: Recipe | None = None) -> nn.Module:
        """Return a copy of the network with ``items`` carried out; with a recipe, quantized after training."""
        copy = copy_network(self.model)
        apply_items(copy, self.example, self.space, items, calls=self.calibration, before=self._statistics)
        if recipe is not None:
            quantize(copy, self.calibration[0], recipe, data=self.calibration, progress_bar=False)
        return copy

    def score(self, network: nn.Module, recipe: Recipe | None = None) -> Score:
        """Compare the outputs of ``network``, fake-quantized if there is a recipe, with those of the first network."""
        if recipe is None:
            outputs = self._outputs(network)
        else:
            network.eval()
            with plain_execution(), fake_quantized(network):
                outputs = self._run(network)
        pairs = list(zip(outputs, self._plain, strict=True))
        found = [output_distance(*pair, self.distance, self.class_dim) for pair in pairs]
        changed = [_changed(*pair, self.class_dim) for pair in pairs] if self.distance == "kl" else []
        return Score(float(torch.stack(found).mean()), sum(changed) / max(len(changed), 1))

    def digest(self) -> str:
        """Return the digest of the weights and of the batches."""
        tensors = {name: tensor for name, tensor in self.model.state_dict().items() if isinstance(tensor, Tensor)}
        calls = [list(tensors_in((call.args, call.kwargs))) for call in (*self.calibration, *self.evaluation)]
        return digest([tensors, calls, len(self.calibration), self.distance, self.class_dim])

    def _check_outputs(self) -> None:
        for tensor in (tensor for tensor in tensors_in(self._plain) if tensor.is_floating_point()):
            by_class = self.distance == "kl"
            if by_class and not -tensor.dim() <= self.class_dim < tensor.dim():
                raise ValueError(
                    f"`class_dim={self.class_dim}` on `{type(self.model).__name__}`: expected a dimension of its "
                    f'outputs, found the shape {tuple(tensor.shape)}. For outputs without classes: `distance="mse"`.'
                )
            if not tensor.isfinite().all():
                raise ValueError(
                    f"Search on `{type(self.model).__name__}`: expected finite outputs of the network as it is, found "
                    "others. Check its weights and `data`."
                )

    def _outputs(self, network: nn.Module) -> list[Any]:
        with isolated(network):
            return self._run(network)

    def _run(self, network: nn.Module) -> list[Any]:
        return [network(*call.args, **call.kwargs) for call in self.evaluation]


def computing(network: nn.Module, recipe: Recipe | None) -> AbstractContextManager[Any]:
    """Inside, ``network`` is fake-quantized if there is a recipe."""
    return nullcontext() if recipe is None else fake_quantized(network)


def split_batches(
    call: str, model: nn.Module, data: Iterable[Any], calibration: int, evaluation: int
) -> tuple[list[ExampleInput], list[ExampleInput]]:
    """Take the first batches of ``data``, and hold back those on which outputs are compared.

    Raises:
        ValueError: there is only one batch.
    """
    calls = [example_of_batch(batch, model) for batch in first_batches(data, calibration + evaluation)]
    if len(calls) < 2:
        raise ValueError(
            f"`{call}(data=...)`: expected at least two batches, one part for batch-norm statistics and another, held "
            f"back, to compare outputs; found {len(calls)}. Give the loader of the training data, or smaller batches."
        )
    first = min(calibration, max(1, len(calls) * calibration // (calibration + evaluation)))
    return calls[:first], calls[first:]


def _changed(outputs: Any, plain: Any, class_dim: int) -> float:
    pairs = [(a, b) for a, b in zip(tensors_in(outputs), tensors_in(plain), strict=True) if a.is_floating_point()]
    different = [(a.argmax(class_dim) != b.argmax(class_dim)).float().mean() for a, b in pairs]
    return float(torch.stack(different).mean())
