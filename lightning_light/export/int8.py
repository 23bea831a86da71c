"""What all formats do with a fake-quantized network: it is written as int8."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_light.errors import UnsupportedError
from lightning_light.export.inputs import Positional
from lightning_light.export.program import Program, flat_tensors, traced
from lightning_light.int8 import LoweredModel, QDQConstraints, Quantizer, quantizers_of
from lightning_light.order import Stage
from lightning_light.surgery.attachment import states_of

__all__ = ["check_details", "describe", "quantizer_of", "traced_int8", "warn_of_float_file"]


def quantizer_of(call: str, model: nn.Module) -> Quantizer | None:
    """The quantizer at work on ``model``; None if it computes in float, which makes a float file.

    Raises:
        UnsupportedError: there are several.
    """
    found = [quantizer for quantizer in quantizers_of(model) if quantizer.enabled]
    if len(found) > 1:
        raise UnsupportedError(
            f"`{call}` on `{type(model).__name__}`: expected a network that is fake-quantized once, found {len(found)} "
            "callbacks or contexts that do so. Leave `fake_quantized` while a Trainer with "
            "`QuantizationAwareTraining` is at work."
        )
    return found[0] if found else None


def warn_of_float_file(model: nn.Module) -> None:
    """Warn where a network that was quantized computes in float, so that its file will be float too."""
    claims = [claim for state in states_of(model).values() for claim in state.claims.values()]
    if any(claim.stage == Stage.QUANTIZATION for claim in claims) and quantizer_of("export_model", model) is None:
        warnings.warn(
            f"`export_model` on `{type(model).__name__}`: a float file of a quantized network, because it computes in "
            "float outside of `fake_quantized`. For an int8 file: `with fake_quantized(model): export_model(...)`.",
            stacklevel=3,
        )


def traced_int8(
    call: str, model: Positional, tensors: tuple[Any, ...], constraints: QDQConstraints, *, largest: int | None = None
) -> tuple[Program, dict[str, Any]]:
    """As `traced`, as a QDQ graph where the network is fake-quantized; and details for the report.

    Args:
        call: the exporter, as the user wrote it.
        model: a copy in evaluation mode; of no further use, where it is fake-quantized.
        tensors: an example call, one sample.
        constraints: of the runtime.
        largest: samples in a batch, at most.

    Raises:
        TraceError: as `traced`.
    """
    quantizer = quantizer_of(call, model.model)
    if quantizer is None:
        return traced(call, model, tensors, largest=largest), {}
    with quantizer.qdq(lambda: model(*tensors), constraints, release_weights=True) as lowered:
        program = traced(call, model, tensors, largest=largest)
    return program, describe(call, model, lowered)


def describe(call: str, model: Positional, lowered: LoweredModel) -> dict[str, Any]:
    """Details for the report; warns of layers that stay float, by name."""
    if lowered.left_float:
        warnings.warn(
            f"`{call}` on `{type(model.model).__name__}`: layers that stay float: {lowered.left_float}.", stacklevel=3
        )
    return {
        "int8_layers": lowered.layers,
        "left_float": lowered.left_float,
        "never_int8": _never_int8(model.model, lowered),
        "output_scales": [float(scale) for scale in flat_tensors(lowered.output_scales)],
    }


def check_details(call: str, model: nn.Module, details: Mapping[str, Any]) -> None:
    """Refuse a file that an exporter wrote in float from a fake-quantized network.

    Raises:
        UnsupportedError: names the function that traces a network as int8.
    """
    if "int8_layers" not in details and quantizer_of(call, model) is not None:
        raise UnsupportedError(
            f"`{call}` on `{type(model).__name__}`: expected an int8 file of a fake-quantized network, found an "
            "exporter that writes float operations. In `write`, trace with `lightning_light.export.int8.traced_int8` "
            "and return its details; for a float file, export the network before it is quantized."
        )


def _never_int8(model: nn.Module, lowered: LoweredModel) -> dict[str, str]:
    """Modules with a weight that int8 is not for (embeddings, recurrent layers, fused attention), and their types."""
    done = {*lowered.modules, *lowered.left_float}
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        name = path.partition(".parametrizations")[0]
        has_weight = any(one.dim() > 1 and one.is_floating_point() for one in module.parameters(recurse=False))
        if has_weight and name not in done:
            found[name] = type(model.get_submodule(name)).__name__
    return found
