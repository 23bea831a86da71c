"""Expand and merge convolutions of a live model, and replay both on a structure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import DataTable, Tabular, layer_lines
from lightning_light.merging import BranchedLayer
from lightning_light.order import Stage
from lightning_light.reparameterization.branches import ExpandedConv2d, Spec, expand, is_replaced
from lightning_light.reparameterization.forms import Form
from lightning_light.surgery.operations import register_operation
from lightning_light.surgery.plain_layers import why_not_plain
from lightning_light.surgery.replace import put_module, replace_modules, replaced_layer
from lightning_light.surgery.trial import failing_replacements
from lightning_light.targets import Targets

__all__ = [
    "METHOD",
    "Expansion",
    "Merged",
    "branched_layers",
    "expand_layers",
    "merge_layers",
    "merged_tensors",
    "plan_expansion",
]

METHOD = "reparameterization"
EXPAND = "reparameterization/expand"
MERGE = "reparameterization/merge"

_replace = partial(replace_modules, method=METHOD, stage=Stage.REPARAMETERIZATION)

Merged = dict[str, tuple[Tensor, Tensor | None]]
"""Name of a layer -> kernel and bias of the convolution that it merges into, on the CPU."""


@dataclass(frozen=True)
class Expansion(Tabular):
    """Which convolutions are expanded.

    Attributes:
        layers: name -> the branches that it gets.
        skipped: name of each other targeted convolution -> the reason why it is left alone.
    """

    layers: dict[str, list[Spec]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per convolution."""
        expanded = [f"{name}: {', '.join(branch for branch, *_ in branches)}" for name, branches in self.layers.items()]
        return [layer_lines(expanded + [f"{name}: left alone ({reason})" for name, reason in self.skipped.items()])]

    def summary(self) -> str:
        """Return one line for the log."""
        count = sum(map(len, self.layers.values()))
        left = "; ".join(f"{name} ({reason})" for name, reason in self.skipped.items())
        names = ", ".join(self.layers)
        return f"{len(self.layers)} convolutions with {count} branches: {names or 'none'}. Left alone: {left or 'none'}"


def plan_expansion(
    model: nn.Module,
    form: Form,
    targets: Targets,
    *,
    optimizers: Iterable[Any] | None = None,
    example: ExampleInput | None = None,
) -> Expansion:
    """Choose the convolutions to expand; nothing is changed.

    Args:
        model: any module.
        form: determines the branches.
        targets: convolutions among them are considered.
        optimizers: those that train the model; None where that is not known.
        example: one call of the model, in which the expanded layers are tried; None to try nothing.

    Raises:
        TargetError: ``targets`` match no module.
    """
    why_not = why_not_plain(model, optimizers)
    plan = Expansion()
    inside = tuple(f"{name}." for name in branched_layers(model))
    for name, module in targets.select(model).items():
        if (
            not isinstance(module, nn.modules.conv._ConvNd)
            or isinstance(module, BranchedLayer)
            or name.startswith(inside)
        ):
            continue
        reason = why_not(name, module)
        specs = [] if reason or not isinstance(module, nn.Conv2d) else form.branches(module)
        if specs:
            plan.layers[name] = specs
        else:
            size = "x".join(map(str, module.kernel_size))
            plan.skipped[name] = reason or f"{type(form).__name__} has no branches for a {size} kernel"
    if example is not None:
        failing = failing_replacements(model, _expanded(model, plan.layers), example.to(model))
        plan.skipped.update(failing)
        for name in failing:
            del plan.layers[name]
    return plan


def _expanded(model: nn.Module, layers: Mapping[str, Sequence[Spec]], scale: float = 0.0) -> dict[str, ExpandedConv2d]:
    convs = {name: cast(nn.Conv2d, model.get_submodule(name)) for name in layers}
    return {name: expand(convs[name], specs, name, scale) for name, specs in layers.items()}


def expand_layers(
    model: nn.Module, layers: Mapping[str, Sequence[Spec]], *, initial_scale: float = 0.0, **followers: Any
) -> dict[str, Any]:
    """Expand convolutions in place; without a scale the function stays the same in training and in evaluation mode.

    Args:
        model: the live model.
        layers: name -> the branches that it gets.
        initial_scale: of every branch.
        **followers: ``optimizers``, where its branches are put behind the weight of a convolution, and
            ``averaged_models``, as in `replace_modules`.

    Returns:
        The edit log's entry.

    Raises:
        SurgeryError: see `replace_modules`; nothing is changed.
        UnsupportedError: a later method owns one of the layers; nothing is changed.
    """
    new = _expanded(model, layers, initial_scale)
    weights = ((cast(nn.Parameter, layer.main.weight), layer.branches.parameters()) for layer in new.values())
    _replace(model, new, parameters={weight: [weight, *added] for weight, added in weights}, **followers)
    return {"op": EXPAND, "layers": {name: [list(spec) for spec in specs] for name, specs in layers.items()}}


def branched_layers(model: nn.Module) -> dict[str, ExpandedConv2d]:
    """Return the expanded convolutions of ``model`` by their first names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpandedConv2d)}


def merged_tensors(model: nn.Module, live: nn.Module | None = None) -> Merged:
    """Compute what the expanded convolutions of ``model`` merge into; nothing is changed.

    Args:
        model: the model, or an averaged copy of it.
        live: the model that ``model`` is an averaged copy of: its running statistics take the place of those that no
            batch has updated in the copy.

    Raises:
        UnsupportedError: another method has replaced a layer inside a branch.
    """
    merged = {}
    for name, branched in branched_layers(model).items():
        _check_intact(name, branched)
        if live is not None:
            _take_missing_statistics(branched, live.get_submodule(name))
        merged[name] = branched.kernel_and_bias()
    return merged


def merge_layers(
    model: nn.Module,
    merged: Merged,
    *,
    optimizers: Iterable[Any] = (),
    averaged_models: Mapping[nn.Module, Merged] | None = None,
) -> dict[str, Any]:
    """Replace expanded convolutions by merged ones in place; the function stays the same in evaluation mode.

    Args:
        model: the live model.
        merged: what `merged_tensors` has computed.
        optimizers: they keep the state of the parameters that stay.
        averaged_models: averaged copies of ``model`` -> what was computed of them.

    Returns:
        The edit log's entry.

    Raises:
        SurgeryError: see `replace_modules`; nothing is changed.
        UnsupportedError: a later method owns one of the layers; nothing is changed.
    """
    averaged_models = averaged_models or {}
    new: dict[str, nn.Module] = {}
    followers: dict[nn.Parameter, list[nn.Parameter]] = {}
    for name in merged:
        branched = model.get_submodule(name)
        assert isinstance(branched, ExpandedConv2d)
        new[name] = layer = branched.unfilled()
        staying = {id(parameter) for parameter in layer.parameters()}
        followers |= {parameter: [] for parameter in branched.parameters() if id(parameter) not in staying}
    _replace(model, new, optimizers=optimizers, parameters=followers, averaged_models=list(averaged_models))
    for changed, values in {model: merged, **averaged_models}.items():
        for name, (kernel, bias) in values.items():
            _assign(changed.get_submodule(name), kernel, bias)
    return {"op": MERGE, "layers": list(merged)}


@register_operation(EXPAND)
def replay_expansion(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Put branches beside the convolutions; their tensors come from the state dict."""
    for name, specs in entry["layers"].items():
        conv = replaced_layer(model, name)
        branched = expand(conv, specs)
        put_module(model, name, branched.to(dtype=conv.weight.dtype))


@register_operation(MERGE)
def replay_merging(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Put merged convolutions in the place of the expanded ones; their tensors come from the state dict."""
    for name in entry["layers"]:
        branched: Any = model.get_submodule(name)
        put_module(model, name, branched.unfilled())


def _check_intact(name: str, branched: ExpandedConv2d) -> None:
    for layer in branched.parts():
        if is_replaced(layer):
            raise UnsupportedError(
                f"`{METHOD}` on `{name}`: expected branches of convolutions and batch norms, found a "
                f"`{type(layer).__name__}`: another method has replaced one of its layers. Merge the branches first, "
                "then use the other method."
            )


def _take_missing_statistics(copied: BranchedLayer, live: nn.Module) -> None:
    for own, other in zip(copied.modules(), live.modules(), strict=True):
        if isinstance(own, nn.BatchNorm2d) and own.num_batches_tracked == 0:
            own.load_state_dict({**own.state_dict(), **dict(other.named_buffers())})


def _assign(layer: nn.Module, kernel: Tensor, bias: Tensor | None) -> None:
    with torch.no_grad():
        for parameter, value in ((layer.weight, kernel), (layer.bias, bias)):
            if isinstance(parameter, nn.Parameter) and value is not None:
                parameter.copy_(value)
