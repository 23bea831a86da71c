"""What all formats do with a network whose numbers are rounded: it is written as int8."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_light.errors import UnsupportedError
from lightning_light.export.inputs import Positional
from lightning_light.export.program import Program, flat_tensors, traced
from lightning_light.int8 import Int8Form, PairRules, RoundsNumbers, rounders_of

__all__ = ["described", "rounder_of", "traced_int8"]


def rounder_of(call: str, model: nn.Module) -> RoundsNumbers | None:
    """Who rounds numbers in ``model`` now; None if they are plain ones, which make a float file.

    Raises:
        UnsupportedError: there are several.
    """
    found = [rounder for rounder in rounders_of(model) if rounder.is_rounding]
    if len(found) > 1:
        raise UnsupportedError(
            f"`{call}` on `{type(model).__name__}`: expected numbers to be rounded once, found {len(found)} callbacks "
            "or contexts that round them. Leave `fake_quantized` while a Trainer with `QuantizationAwareTraining` is "
            "at work."
        )
    return found[0] if found else None


def traced_int8(
    call: str, model: Positional, tensors: tuple[Any, ...], rules: PairRules, *, largest: int | None = None
) -> tuple[Program, dict[str, Any]]:
    """As `traced`, with quantize and dequantize operations where numbers are rounded; and what the report says of it.

    Args:
        call: the exporter, as the user wrote it.
        model: a copy in evaluation mode.
        tensors: an example call, one sample.
        rules: what the runtime asks of such a graph.
        largest: samples in a batch, at most.

    Raises:
        TraceError: as `traced`.
    """
    rounder = rounder_of(call, model.model)
    if rounder is None:
        return traced(call, model, tensors, largest=largest), {}
    with rounder.in_pairs(lambda: model(*tensors), rules) as form:
        program = traced(call, model, tensors, largest=largest)
    return program, described(call, model, form)


def described(call: str, model: Positional, form: Int8Form) -> dict[str, Any]:
    """For the report; and a warning that names the layers that stay float."""
    if form.left_float:
        warnings.warn(
            f"`{call}` on `{type(model.model).__name__}`: layers that stay float: {form.left_float}.", stacklevel=3
        )
    return {
        "int8_layers": form.layers,
        "left_float": form.left_float,
        "never_int8": _never_int8(model.model, form),
        "output_scales": [float(scale) for scale in flat_tensors(form.scales)],
    }


def _never_int8(model: nn.Module, form: Int8Form) -> dict[str, str]:
    """Modules with a weight that int8 is not for (embeddings, recurrent layers, fused attention), and their types."""
    done = {*form.modules, *form.left_float}
    return {
        name: type(model.get_submodule(name)).__name__
        for name in dict.fromkeys(path.partition(".parametrizations")[0] for path in _with_weights(model))
        if name not in done
    }


def _with_weights(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        if any(one.dim() > 1 and one.is_floating_point() for one in module.parameters(recurse=False)):
            yield path
