"""Compare the outputs of an exported file with those of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_light.errors import ParityError
from lightning_light.export.inputs import in_order
from lightning_light.nested import named_leaves
from lightning_light.validation import Fraction, NonNegativeFloat, validated

__all__ = ["Parity", "Tolerance", "compare_outputs"]

_QUANTIZATION_STEPS = 255


@validated
@dataclass(frozen=True)
class Tolerance:
    """Maximum difference of an output: ``|file - model| <= absolute + relative * max(|model|, rms)`` in every element.

    ``rms`` is the root mean square of the output, to which rounding errors are proportional. The defaults allow for the
    summation order of float32 in a folded network only. An int8 file may additionally differ by ``quant_steps``
    quantization steps of the output, because a difference of one step in one layer can propagate, and by more in a
    fraction of the elements. A step is the output's scale or, for an output that is not quantized, the range of the
    model's output over 255.

    Example:
        >>> Tolerance(absolute=1e-3)
        Tolerance(absolute=0.001, relative=0.0001, quant_steps=16.0, outliers=0.001)

    Args:
        absolute: absolute difference.
        relative: difference relative to the model's output.
        quant_steps: quantization steps of the output, in int8 files.
        outliers: fraction of an output's elements that may differ by more, in int8 files.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    absolute: NonNegativeFloat = 1e-4
    relative: NonNegativeFloat = 1e-4
    quant_steps: NonNegativeFloat = 16.0
    outliers: Fraction = 1e-3


@dataclass(frozen=True)
class Parity:
    """Differences between a file and the model.

    Attributes:
        max_absolute: the largest ``|file - model|`` of any element of any output.
        max_relative: the largest ``max |file - model| / max |model|`` of any output of any batch.
        batches: number of compared calls.
        samples: number of samples in them.
        quant_steps: of an int8 file: output -> the largest ``|file - model|`` in quantization steps, see `Tolerance`;
            constant outputs are left out.
    """

    max_absolute: float
    max_relative: float
    batches: int
    samples: int
    quant_steps: dict[str, float] = field(default_factory=dict)


def compare_outputs(
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
        calls: number of samples, and the argument of both.
        tolerance: maximum difference.
        scales: of an int8 file: of each output, 0.0 where it is not quantized.

    Raises:
        ParityError: an element differs by more, is NaN in one of the two only, or the outputs have other shapes.
    """
    absolute = relative = 0.0
    batches = samples = 0
    steps: dict[str, float] = {}
    for size, call in calls:
        expected, found = _outputs(model(call)), _outputs(file(call))
        _check_structure(expected, found)
        for place, ((name, right), (_, output)) in enumerate(zip(expected, found, strict=True)):
            step = 0.0 if scales is None else scales[place] or _range(right) / _QUANTIZATION_STEPS
            off = _check_output(name, right, output, tolerance, step, batches)
            absolute, relative = max(absolute, off), max(relative, off / max(_largest(right), 1e-30))
            if step:
                steps[name] = max(steps.get(name, 0.0), off / step)
        batches, samples = batches + 1, samples + size
    return Parity(absolute, relative, batches, samples, steps)


def _outputs(result: Any) -> list[tuple[str, Tensor]]:
    leaves = named_leaves(in_order(result), objects=True)
    return [(f"output{path}", leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _check_structure(expected: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]]) -> None:
    shapes = [[(tuple(tensor.shape)) for _, tensor in outputs] for outputs in (expected, found)]
    if shapes[0] != shapes[1]:
        raise ParityError(
            f"The exported file and the model: expected outputs of shapes {shapes[0]}, found {shapes[1]}. "
            "A shape that depends on the input was made a constant by tracing: compute it with tensor operations "
            "(`x.flatten(1)` in place of `x.view(int(n), -1)`)."
        )


def _check_output(name: str, right: Tensor, output: Tensor, tolerance: Tolerance, step: float, batch: int) -> float:
    """Return the largest difference; raise if it is above the tolerance."""
    relative = tolerance.relative if right.is_floating_point() else 0.0  # indices are equal or not
    right, output = right.detach().double().cpu(), output.detach().double().cpu()
    same = (right == output) | (right.isnan() & output.isnan())
    off = torch.where(same, 0.0, (output - right).abs())
    size = right.abs().clamp_min(right[right.isfinite()].square().mean().sqrt().nan_to_num())
    allowed = tolerance.absolute + relative * size + tolerance.quant_steps * step
    wrong = ~same & ~(right.isfinite() & (off <= allowed))  # infinity and NaN have to be equal
    outliers = tolerance.outliers * right.numel() if step and off.isfinite().all() else 0.0
    if int(wrong.sum()) > outliers:
        worst = int(torch.where(wrong, off.nan_to_num(nan=math.inf) - allowed.nan_to_num(), -math.inf).argmax())
        raise ParityError(
            f"`parity={tolerance}`: expected the exported file to compute the outputs of the model, found "
            f"{int(wrong.sum())} of {right.numel()} elements of {name} outside the tolerance in batch {batch}; the "
            f"worst is {output.flatten()[worst]:.6g} in the file, {right.flatten()[worst]:.6g} in the model. The usual "
            "causes: a branch or loop that depends on values, random numbers in `forward`, or a state that it changes. "
            "For rounding errors, of half precision for instance, allow more: `parity=Tolerance(absolute=...)`"
            + (f", of int8 `Tolerance(quant_steps=..., outliers=...)`: a step is {step:.3g} here." if step else ".")
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
