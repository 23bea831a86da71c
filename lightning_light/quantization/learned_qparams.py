"""Learned quantization parameters: their first values, and their place in the user's optimizers.

They are no part of the LightningModule: its state dict, its averaged copies and DDP's buckets do not know them. The
values are in the method's state, so that checkpoints have them; the optimizer that trains a layer trains its
quantization parameters too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_light.errors import UnsupportedError
from lightning_light.quantization.fake_quantize import SMALLEST_SCALE
from lightning_light.quantization.op_calls import OpId
from lightning_light.quantization.plan import QuantizationPlan
from lightning_light.quantization.specs import ActivationSpec, QParams, WeightSpec
from lightning_light.schema import damage
from lightning_light.surgery.optimizer import adopt, owners_of, unwrap

__all__ = ["initial_values", "learned_by", "learned_parameters", "learned_qparams_of", "names_of", "weight_scale"]

_QUANTITIES = {"scale": ("scale",), "scale and offset": ("scale", "offset"), "clip": ("clip",)}


class LearnedValue(NamedTuple):
    """What is learned of one tensor: the module that it belongs to, how it is quantized, and which quantity it is."""

    module: str
    spec: WeightSpec | ActivationSpec
    quantity: str = "scale"


def names_of(activation: int, spec: ActivationSpec) -> dict[str, str]:
    """What is learned of one activation, and its names in checkpoints.

    Example:
        >>> names_of(3, ActivationSpec(learned="scale and offset"))
        {'scale': 'activation 3: scale', 'offset': 'activation 3: offset'}
    """
    return {quantity: f"activation {activation}: {quantity}" for quantity in _QUANTITIES.get(spec.learned, ())}


def weight_scale(op: OpId) -> str:
    """Name of the learned scale of a layer's weight."""
    module, call, function, occurrence = op
    return f"weight of {module or 'the model'}, call {call}, {function} {occurrence}: scale"


def initial_values(specs: Sequence[ActivationSpec], observed: Sequence[QParams | None]) -> dict[str, Tensor]:
    """First values of all that is learned of activations and was observed.

    Args:
        specs: of the activations.
        observed: their quantization parameters.
    """
    found: dict[str, Tensor] = {}
    for activation, (spec, qparams) in enumerate(zip(specs, observed, strict=True)):
        if qparams is not None:
            scale, zero_point, top = qparams
            values = {"scale": scale, "offset": -scale * zero_point, "clip": scale * top}
            found |= {name: torch.tensor(values[quantity]) for quantity, name in names_of(activation, spec).items()}
    return found


def learned_qparams_of(learned: Mapping[str, Tensor], activation: int, spec: ActivationSpec) -> QParams | None:
    """Quantization parameters as learned so far; None where nothing is learned."""
    names = names_of(activation, spec)
    if not names or not learned.keys() >= set(names.values()):
        return None
    values, top = {quantity: learned[name].detach() for quantity, name in names.items()}, spec.quant_max
    if "clip" in values:
        return QParams(float(values["clip"].clamp_min(SMALLEST_SCALE) / top), 0, top)
    scale = values["scale"].abs().clamp_min(SMALLEST_SCALE)
    if "offset" in values:
        return QParams(float(scale), int((-values["offset"] / scale).round().clamp(0, top)), top)
    return QParams(float(scale), 0 if spec.non_negative else (top + 1) // 2, top)


def learned_parameters(
    state: dict[str, Any], plan: QuantizationPlan, model: nn.Module, optimizers: Iterable[Any]
) -> dict[str, nn.Parameter]:
    """Make parameters of all that is learned, by name, and add each to the optimizer of its layer.

    Args:
        state: of the method; its ``learned`` has the values, and shares their memory from now on.
        plan: of the network.
        model: the live module.
        optimizers: of the run.

    Raises:
        UnsupportedError: no optimizer takes parameters during a run.
    """
    unwrapped, known = [unwrap(optimizer) for optimizer in optimizers], learned_by(plan)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    parameters = {name: nn.Parameter(value.to(device).clone()) for name, value in state["learned"].items()}
    places: dict[str, list[int]] = state["optimizer_groups"]
    for name, parameter in parameters.items():
        state["learned"][name] = parameter.detach()
        if name not in places:
            places[name] = _place(model, known[name].module, unwrapped)
        optimizer, group = places[name]
        if optimizer >= len(unwrapped) or group >= len(unwrapped[optimizer].param_groups):
            raise damage(f"optimizer_groups[{name!r}]", "an optimizer and a group of this run", str(places[name]))
        adopt(unwrapped[optimizer].param_groups[group], parameter, f"quantization.{name}")
    return parameters


def _place(model: nn.Module, path: str, optimizers: Sequence[Optimizer]) -> list[int]:
    """The optimizer that changes the module at ``path``, and in it the group with the least weight decay."""
    owners = [place for module in (model.get_submodule(path), model) for place in owners_of(module, optimizers)]
    places = [place for place in owners if not isinstance(optimizers[place], torch.optim.LBFGS)]
    if not places:
        raise UnsupportedError(
            "`QuantizationAwareTraining` with learned scales: expected an optimizer of the module that takes "
            f"parameters during a run, found {[type(one).__name__ for one in optimizers] or 'none'}. Train with "
            "`SGD` or `AdamW`, or use a recipe with observers: `IntN(...)`."
        )
    decays = [float(group.get("weight_decay", 0.0)) for group in optimizers[places[0]].param_groups]
    return [places[0], decays.index(min(decays))]


def learned_by(plan: QuantizationPlan) -> dict[str, LearnedValue]:
    """Name of what is learned by ``plan`` -> what it is."""
    layers = plan.layers.items()
    found = {weight_scale(op): LearnedValue(op.module, site.weight) for op, site in layers if site.weight.learned}
    for op, activation in plan.sites():
        spec = plan.activations[activation]
        for quantity, name in names_of(activation, spec).items():
            found.setdefault(name, LearnedValue(op.module, spec, quantity))
    return found
