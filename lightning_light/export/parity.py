"""Compare the outputs of an exported file with those of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from lightning_light.errors import ParityError
from lightning_light.export.inputs import in_order

__all__ = ["Parity", "Tolerance", "compare"]

_STEPS = 255


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be off: ``|file - model| <= absolute + relative * |model|`` in every element.

    The defaults allow for the order of float32 sums only. For int8 files they add ``quant_steps`` quantization steps
    of the output, because a difference of one step can propagate through the layers: ``quant_steps * scale``, or, for a
    float output, the range of the model's output over 255.

    Example:
        >>> Tolerance(absolute=1e-3)
        Tolerance(absolute=0.001, relative=0.0001, quant_steps=8.0)

    Args:
        absolute: of any file.
        relative: of any file.
        quant_steps: of an int8 file, on top.
    """

    absolute: float = 1e-4
    relative: float = 1e-4
    quant_steps: float = 8.0

    def __post_init__(self) -> None:
        if not (self.absolute >= 0.0 and self.relative >= 0.0 and self.quant_steps >= 0.0):
            raise ValueError(f"`{self}`: expected three numbers >= 0. Usual is `Tolerance(absolute=1e-4)`.")


@dataclass(frozen=True)
class Parity:
    """How close a file came to the model.

    Attributes:
        max_absolute: the largest ``|file - model|`` of any element of any output.
        max_relative: the largest ``max |file - model| / max |model|`` of any output of any batch.
        batches: calls that were compared.
        samples: samples in them.
        steps: of an int8 file: the largest ``|file - model|`` of each output in quantization steps, as in `Tolerance`;
            an output that is a single number has none.
    """

    max_absolute: float
    max_relative: float
    batches: int
    samples: int
    steps: dict[str, float] = field(default_factory=dict)


def compare(
    model: Callable[[Any], Any],
    file: Callable[[Any], Any],
    calls: Iterable[tuple[int, Any]],
    tolerance: Tolerance,
    scales: Sequence[float] | None = None,
) -> Parity:
    """Compare all outputs of ``model`` and ``file``, however they are nested.

    Args:
        model: the reference.
        file: the exported file.
        calls: number of samples, and what both are called with.
        tolerance: how far an element may be off.
        scales: of an int8 file: of each output, 0.0 for a float output.

    Raises:
        ParityError: an element is further off, is NaN in one of the two only, or the outputs have other shapes.
    """
    absolute = relative = 0.0
    batches = samples = 0
    steps: dict[str, float] = {}
    for size, call in calls:
        expected, found = _outputs(model(call)), _outputs(file(call))
        _check_structure(expected, found)
        for place, ((name, right), (_, asked)) in enumerate(zip(expected, found, strict=True)):
            step = 0.0 if scales is None else scales[place] or _range(right) / _STEPS
            off = _check_output(name, right, asked, tolerance, step, batches)
            absolute, relative = max(absolute, off), max(relative, off / max(_largest(right), 1e-30))
            if step:
                steps[name] = max(steps.get(name, 0.0), off / step)
        batches, samples = batches + 1, samples + size
    return Parity(absolute, relative, batches, samples, steps)


def _outputs(result: Any) -> list[tuple[str, Tensor]]:
    leaves, _ = tree_flatten_with_path(in_order(result))
    return [(f"output{keystr(path)}", leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _check_structure(expected: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]]) -> None:
    shapes = [[(tuple(tensor.shape)) for _, tensor in outputs] for outputs in (expected, found)]
    if shapes[0] != shapes[1]:
        raise ParityError(
            f"The exported file and the model: expected outputs of shapes {shapes[0]}, found {shapes[1]}. "
            "A shape that depends on the input was built in while tracing: compute it with tensor operations "
            "(`x.flatten(1)` in place of `x.view(int(n), -1)`)."
        )


def _check_output(name: str, right: Tensor, asked: Tensor, tolerance: Tolerance, step: float, batch: int) -> float:
    """The largest difference; an error if it is one too many."""
    right, asked = right.detach().double().cpu(), asked.detach().double().cpu()
    same = (right == asked) | (right.isnan() & asked.isnan())
    off = torch.where(same, 0.0, (asked - right).abs())
    allowed = tolerance.absolute + tolerance.relative * right.abs() + tolerance.quant_steps * step
    wrong = ~same & ~(right.isfinite() & (off <= allowed))  # nothing is near to infinity, and a NaN is never within
    if wrong.any():
        worst = int(torch.where(wrong, off.nan_to_num(nan=math.inf) - allowed.nan_to_num(), -math.inf).argmax())
        raise ParityError(
            f"`parity={tolerance}`: expected the exported file to answer as the model does, found "
            f"{int(wrong.sum())} of {right.numel()} elements of {name} further off in batch {batch}; the worst is "
            f"{asked.flatten()[worst]:.6g} in the file, {right.flatten()[worst]:.6g} in the model. The usual causes: "
            "a branch or loop that depends on values, random numbers in `forward`, or a state that it changes. For "
            "rounding alone, of half precision for instance, allow more: `parity=Tolerance(absolute=...)`"
            + (f", of int8 `parity=Tolerance(quant_steps=...)`: one is {step:.3g} here." if step else ".")
        )
    return float(off.max()) if off.numel() else 0.0


def _range(tensor: Tensor) -> float:
    values = tensor.detach().double()
    finite = values[values.isfinite()]
    return float(finite.max() - finite.min()) if finite.numel() else 0.0


def _largest(tensor: Tensor) -> float:
    values = tensor.detach().double().abs()
    finite = values[values.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0
