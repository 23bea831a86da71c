"""Find the layers that can be factorized, what one forward pass costs in each, and why the others cannot."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_light.example_input import ExampleInput
from lightning_light.helper_networks import helper_networks, inside
from lightning_light.isolation import isolated
from lightning_light.lowrank.build import current_ranks, dense_weight, exact_factors
from lightning_light.lowrank.factors import factor_form
from lightning_light.lowrank.spectra import DEPTHWISE
from lightning_light.lowrank.splitting import SplitAttention, SplitLinear, split_module, split_weights, why_unsplittable
from lightning_light.nested import tensors_in
from lightning_light.surgery.replace import put_module
from lightning_light.surgery.trial import failing_replacements
from lightning_light.trained_weights import loose_parameters, trained_weights
from lightning_light.training_step import callable_with

__all__ = ["FactorizableLayer", "exact_replacements", "find_layers"]

_FACTORIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_COMPUTING = ("forward", "_conv_forward")


@dataclass(frozen=True, eq=False)
class FactorizableLayer:
    """One matrix of the network that can be replaced by factors.

    Attributes:
        name: path of the layer; of a layer inside ``owner``, its path once the owner is split.
        forms: forms in which it can be factorized, see `lightning_light.lowrank.spectra.Spectrum`.
        weight: ``(groups, out, in, *kernel)``; of a layer that is factorized already, the product of its factors.
        limits: current ranks of a layer that is factorized already, else None.
        positions: applications of the kernel per sample, at the input's resolution, halfway, and at the output's.
        owner: the attention or fused layer that holds the matrix, or an empty string.
        parts: number of parts into which ``owner`` is split.
        shape: of the input of one sample, without the batch; empty if the layer is never called.
    """

    name: str
    forms: tuple[str, ...]
    weight: Tensor
    limits: tuple[int, ...] | None
    positions: tuple[float, float, float]
    owner: str = ""
    parts: int = 0
    shape: tuple[int, ...] = ()

    @property
    def current_cost(self) -> tuple[float, int]:
        """Multiply-accumulates per sample and number of weights of the layer as it is."""
        if self.limits is not None:
            return self.cost(self.forms[0], self.limits)
        weights = self.weight.numel()
        return 0.0 if self.forms == ("embedding",) else self.positions[2] * weights, weights

    def cost(self, form: str, ranks: tuple[int, ...]) -> tuple[float, int]:
        """Return multiply-accumulates per sample and number of weights of the factors at ``ranks``."""
        groups, out, inputs, *kernel = self.weight.shape
        kernel_size = math.prod(kernel)
        before, middle, after = self.positions
        if form == "embedding":
            return after * ranks[0] * inputs, ranks[0] * (out + inputs)
        if form == "spatial":
            first, second = ranks[0] * inputs * kernel[0], ranks[0] * out * kernel[1]
            return groups * (middle * first + after * second), groups * (first + second)
        if form == "depthwise":
            first, second = ranks[0] * inputs * kernel_size, ranks[0] * inputs * out
            return after * (first + second), first + second
        if form == "pointwise":
            first, second = ranks[0] * inputs * out, ranks[0] * out * kernel_size
            return before * first + after * second, first + second
        if form == "tucker2":
            first, core, last = ranks[0] * inputs, ranks[0] * ranks[1] * kernel_size, ranks[1] * out
            return groups * (before * first + after * (core + last)), groups * (first + core + last)
        weights = groups * ranks[0] * (inputs * kernel_size + out)
        return after * weights, weights


@dataclass
class _CallRecorder:
    """Forward hook that records how often, and on which shapes, every layer is applied."""

    samples: int
    positions: dict[nn.Module, list[float]] = field(default_factory=dict)
    shapes: dict[nn.Module, tuple[int, ...]] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        x, y = next(tensors_in((args, kwargs.get("query"), kwargs)), None), next(tensors_in(output), None)
        if x is None or y is None:
            return  # a layer of the user's own, called with sizes for instance
        totals = self.positions.setdefault(module, [0.0, 0.0, 0.0])
        for index, count in enumerate(_positions(module, x, y)):
            totals[index] += count / self.samples
        self.shapes.setdefault(module, tuple(x.shape[1:]))


def find_layers(
    model: nn.Module,
    example: ExampleInput,
    names: Iterable[str],
    *,
    form: str,
    split: Mapping[str, int],
    shrinkable: Collection[str] = (),
) -> tuple[list[FactorizableLayer], dict[str, str]]:
    """Return the layers that can be factorized, and name -> reason for those that cannot.

    Args:
        model: left as found.
        example: one call of the model.
        names: modules that may be changed, with everything inside them.
        form: of convolutions: one form, ``"auto"`` for all that fit and save time where they save multiply-accumulates,
            or ``"timed"`` for all that fit.
        split: pattern of fused linear layers, or of attentions -> number of equal parts of each, or of each of its
            projections.
        shrinkable: names of layers that are factorized already and whose ranks may be lowered further.
    """
    calls = _record_calls(model, example)
    shared = _shared_parameters(model)
    layers: list[FactorizableLayer] = []
    reasons: dict[str, str] = {}
    helpers = helper_networks(model, example)
    names = _outermost(model, names)
    for name in names:
        module = model.get_submodule(name)
        if inside(name, helpers):
            if isinstance(module, _FACTORIZABLE):
                reasons[name] = "it is frozen, and part of a network that is only used to train"
            continue
        parts = next((count for pattern, count in split.items() if fnmatch.fnmatchcase(name, pattern)), 0)
        reason = _why_not(module, shared, calls, parts, may_shrink=name in shrinkable)
        if reason is not None:
            if reason:
                reasons[name] = reason
        elif isinstance(module, nn.MultiheadAttention) or (parts and factor_form(module) is None):
            layers += _layers_inside(name, module, parts, calls)
        else:
            layers.append(_layer(name, module, calls, form))
    known = reasons.keys() | {layer.owner or layer.name for layer in layers}
    others = loose_parameters(model, {name: model.get_submodule(name) for name in ("", *names) if name not in known})
    matrices = [name for name, parameter in others.items() if 1 not in parameter.shape]
    reasons |= dict.fromkeys(matrices, "a parameter of the network's own code, not of a layer that factors can replace")
    failing = failing_replacements(model, exact_replacements(model, layers), example)
    return [layer for layer in layers if (layer.owner or layer.name) not in failing], reasons | failing


def exact_replacements(model: nn.Module, layers: Iterable[FactorizableLayer]) -> dict[str, nn.Module]:
    """Return factors that compute what the layers do, by name, for those that are not factorized yet."""
    found: dict[str, nn.Module] = {}
    for layer in layers:
        if layer.owner:
            if layer.owner not in found:
                found[layer.owner] = split_module(model.get_submodule(layer.owner), layer.parts)
            inner = layer.name.removeprefix(f"{layer.owner}.")
            linear = found[layer.owner].get_submodule(inner)
            put_module(found[layer.owner], inner, exact_factors(linear, "linear"))
        elif layer.limits is None:
            found[layer.name] = exact_factors(model.get_submodule(layer.name), layer.forms[0])
    return found


def _outermost(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Leave out modules inside factors and attentions, which are handled as a whole; add those of split layers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    whole = tuple(
        f"{name}."
        for name, module in modules.items()
        if factor_form(module) or isinstance(module, nn.MultiheadAttention)
    )
    found: dict[str, None] = {}
    for name in names:
        is_split = isinstance(modules.get(name), (SplitAttention, SplitLinear))
        inside = [inner for inner in modules if is_split and inner.startswith(f"{name}.")]
        found |= dict.fromkeys(inner for inner in (name, *inside) if not inner.startswith(whole))
    return list(found)


def _why_not(module: nn.Module, shared: set[int], calls: _CallRecorder, parts: int, *, may_shrink: bool) -> str | None:
    """Return why a module cannot be factorized: None if it can, an empty string if it has no matrix at all."""
    if isinstance(module, nn.MultiheadAttention):
        reason = why_unsplittable(module) or _why_not_called(module, calls) or _why_shared(module, shared)
        return reason or _why_not_divisible(module, parts) or _why_not_finite(module)
    if factor_form(module) is not None:
        return _why_not_called(module, calls) if may_shrink else "it is factorized already"
    if not isinstance(module, _FACTORIZABLE):
        return "a transposed convolution" if isinstance(module, nn.modules.conv._ConvTransposeNd) else ""
    reason = _why_special(module) or _why_shared(module, shared)
    return reason or _why_not_called(module, calls) or _why_not_divisible(module, parts) or _why_not_finite(module)


def _why_special(module: nn.Module) -> str | None:
    if norm := next((source.norm for source in trained_weights(module) if source.norm), None):
        return f"its weight is computed by {norm}, which factors would not follow: remove it first"
    if parametrize.is_parametrized(module):
        return "its weight is computed by a parametrization"
    if "weight" not in module._parameters:
        return "its weight is computed by a hook (a mask of `torch.nn.utils.prune`): make it permanent"
    if hasattr(module, "weight_fake_quant") or hasattr(module, "activation_post_process"):
        return "it is prepared for quantization: factorize first, then quantize"
    if any(getattr(type(module), name, None) is not getattr(_torch_class(module), name, None) for name in _COMPUTING):
        return f"a {type(module).__name__}, which has a `forward` of its own"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its rows are renormalized (`max_norm`)"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and module.in_channels == module.groups:
        return "depthwise: each filter reads one channel, so there is no rank to lower"
    return None


def _torch_class(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in _FACTORIZABLE if isinstance(module, kind))


def _why_shared(module: nn.Module, shared: set[int]) -> str | None:
    if any(id(parameter) in shared for parameter in module.parameters()):
        return "another layer uses its weight too"
    return None


def _why_not_called(module: nn.Module, calls: _CallRecorder) -> str | None:
    return None if module in calls.positions else "it is not called as a layer in a forward pass"


def _why_not_divisible(module: nn.Module, parts: int) -> str | None:
    widths = {nn.Linear: "out_features", nn.MultiheadAttention: "embed_dim"}
    width = next((getattr(module, name) for kind, name in widths.items() if isinstance(module, kind)), None)
    if not parts or (width is not None and width % parts == 0):
        return None
    return f"not a linear layer or an attention whose outputs divide into {parts} equal parts"


def _why_not_finite(module: nn.Module) -> str | None:
    finite = all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    return None if finite else "its weight is not finite"


def _layer(name: str, module: nn.Module, calls: _CallRecorder, form: str) -> FactorizableLayer:
    before, middle, after = calls.positions[module]
    current = factor_form(module)
    return FactorizableLayer(
        name=name,
        forms=_forms(module, form) if current is None else (current,),
        weight=dense_weight(module),
        limits=None if current is None else current_ranks(module),
        positions=(before, middle, after),
        shape=calls.shapes[module],
    )


def _layers_inside(name: str, module: nn.Module, parts: int, calls: _CallRecorder) -> list[FactorizableLayer]:
    before, middle, after = calls.positions[module]
    return [
        FactorizableLayer(
            name=f"{name}.{part}",
            forms=("linear",),
            weight=weight.detach()[None],
            limits=None,
            positions=(before, middle, after),
            owner=name,
            parts=parts,
            shape=(*calls.shapes[module][:-1], weight.shape[1]),
        )
        for part, weight in split_weights(module, parts).items()
    ]


def _forms(module: nn.Module, form: str) -> tuple[str, ...]:
    if not isinstance(module, nn.modules.conv._ConvNd):
        return ("embedding",) if isinstance(module, nn.Embedding) else ("linear",)
    wide = [size for size in module.kernel_size if size > 1]
    if not wide:
        return ("channel",)
    fitting = ["channel", "tucker2", *(["spatial"] if len(wide) == 2 == len(module.kernel_size) else [])]
    orders = DEPTHWISE if module.groups == 1 else ()
    if form == "depthwise" and orders:
        return orders
    if form in {"auto", "timed"}:
        return *fitting, *(orders if form == "timed" else ())
    return (form if form in fitting else "channel",)


def _positions(module: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    form = factor_form(module)
    if isinstance(module, nn.Embedding) or form == "embedding":
        return x.numel(), x.numel(), x.numel()
    if isinstance(module, nn.modules.conv._ConvNd) or form in {"channel", "spatial", "tucker2", *DEPTHWISE}:
        dims = len(_kernel(module))
        inputs, outputs = x.shape[-dims:], y.shape[-dims:]
        batch = x.shape[0] if x.dim() == dims + 2 else 1
        middle = outputs[0] * inputs[1] if dims == 2 else math.prod(outputs)
        return batch * math.prod(inputs), batch * middle, batch * math.prod(outputs)
    return (x.numel() // x.shape[-1],) * 3


def _kernel(module: nn.Module) -> tuple[int, ...]:
    layer: Any = module[0] if isinstance(module, nn.Sequential) else module
    return tuple(layer.kernel_size)


def _shared_parameters(model: nn.Module) -> set[int]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {parameter for parameter, count in owners.items() if count > 1}


def _record_calls(model: nn.Module, example: ExampleInput) -> _CallRecorder:
    """Run one forward pass in evaluation mode and record the calls of all layers."""
    calls = _CallRecorder(example.samples)
    with callable_with(model, example), isolated(model), ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (*_FACTORIZABLE, nn.MultiheadAttention)) or factor_form(module):
                stack.callback(module.register_forward_hook(calls, with_kwargs=True).remove)
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        model(*example.args, **example.kwargs)
    return calls
