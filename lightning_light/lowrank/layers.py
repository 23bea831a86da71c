"""Which layers can be factored, what a forward pass asks of each, and why the others cannot."""

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

from lightning_light.example_input import ExampleInput, tensors_in
from lightning_light.lowrank.attention import Blocks, OpenAttention, opened_weights, why_closed
from lightning_light.lowrank.build import current_ranks, dense_weight, factor_form
from lightning_light.measure.isolation import isolated

__all__ = ["Layer", "find_layers"]

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


@dataclass(frozen=True, eq=False)
class Layer:
    """One matrix of the network that may become factors.

    Attributes:
        name: the path at which the layer stands, or will stand once ``owner`` is opened.
        forms: in which it can be factored.
        weight: ``(groups, out, in, *kernel)``; of the factors multiplied, if it is factored already.
        limits: its ranks now, for a layer that is factored already.
        positions: how often the layer is applied for one sample: on its input's grid, halfway, on its output's.
        owner: the attention or fused layer that holds it.
        blocks: in how many parts ``owner`` falls.
        shape: of its input for one sample, without the batch; empty if the layer is never called.
    """

    name: str
    forms: tuple[str, ...]
    weight: Tensor
    limits: tuple[int, ...] | None
    positions: tuple[float, float, float]
    owner: str = ""
    blocks: int = 0
    shape: tuple[int, ...] = ()

    @property
    def macs(self) -> float:
        """Multiply-accumulates of the layer as it is, for one sample."""
        return 0.0 if self.forms == ("embedding",) else self.positions[2] * self.weight.numel()

    def cost(self, form: str, ranks: tuple[int, ...]) -> tuple[float, int]:
        """(multiply-accumulates of one sample, weights) of the factors at ``ranks``."""
        groups, out, inputs, *kernel = self.weight.shape
        feature_layers = math.prod(kernel)
        before, middle, after = self.positions
        if form == "embedding":
            return after * ranks[0] * inputs, ranks[0] * (out + inputs)
        if form == "spatial":
            first, second = ranks[0] * inputs * kernel[0], ranks[0] * out * kernel[1]
            return groups * (middle * first + after * second), groups * (first + second)
        if form == "tucker2":
            first, core, last = ranks[0] * inputs, ranks[0] * ranks[1] * feature_layers, ranks[1] * out
            return groups * (before * first + after * (core + last)), groups * (first + core + last)
        weights = groups * ranks[0] * (inputs * feature_layers + out)
        return after * weights, weights


@dataclass
class _Calls:
    samples: int
    positions: dict[nn.Module, list[float]] = field(default_factory=dict)
    shapes: dict[nn.Module, tuple[int, ...]] = field(default_factory=dict)

    def look(self, module: nn.Module, args: Any, output: Any) -> None:
        x, y = next(tensors_in(args)), next(tensors_in(output))
        spots = self.positions.setdefault(module, [0.0, 0.0, 0.0])
        for place, count in enumerate(_positions(module, x, y)):
            spots[place] += count / self.samples
        self.shapes.setdefault(module, tuple(x.shape[1:]))


def find_layers(
    model: nn.Module,
    example: ExampleInput,
    names: Iterable[str],
    *,
    form: str,
    blocks: Mapping[str, int],
    mine: Collection[str] = (),
) -> tuple[list[Layer], dict[str, str]]:
    """The layers that can be factored, and name -> reason for the named ones that cannot.

    Args:
        model: left as found.
        example: one call of it.
        names: of the modules that may be touched, with all that is in them.
        form: of a convolution: ``"auto"`` for all that fit, or one.
        blocks: pattern of fused linear layers, or of attentions -> how many equal parts each, or each projection of
            it, consists of.
        mine: names of layers whose factors may be factored further: their ranks go down.
    """
    calls = _run(model, example)
    shared = _shared_parameters(model)
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for name in _outermost(model, names):
        module = model.get_submodule(name)
        parts = next((count for pattern, count in blocks.items() if fnmatch.fnmatchcase(name, pattern)), 0)
        why = _why_not(module, shared, calls, parts, may_shrink=name in mine)
        if why is not None:
            if why:
                reasons[name] = why
        elif isinstance(module, nn.MultiheadAttention) or (parts and factor_form(module) is None):
            layers += _inside(name, module, parts, calls)
        else:
            layers.append(_layer(name, module, calls, form))
    return layers, reasons


def _outermost(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Without what lies inside factors or inside an attention, which are taken as a whole; with what was opened."""
    known = dict(model.named_modules(remove_duplicate=False))
    whole = tuple(
        f"{name}." for name, module in known.items() if factor_form(module) or isinstance(module, nn.MultiheadAttention)
    )
    found: dict[str, None] = {}
    for name in names:
        opened = isinstance(known.get(name), (OpenAttention, Blocks))
        inside = [inner for inner in known if opened and inner.startswith(f"{name}.")]
        found |= dict.fromkeys(inner for inner in (name, *inside) if not inner.startswith(whole))
    return list(found)


def _why_not(module: nn.Module, shared: set[int], calls: _Calls, parts: int, *, may_shrink: bool) -> str | None:
    """Why a module is left alone: a sentence, or nothing to say about one that has no matrix; None if it is not."""
    if isinstance(module, nn.MultiheadAttention):
        why = why_closed(module) or _not_called(module, calls) or _touched(module, shared)
        return why or _not_divisible(module, parts)
    if factor_form(module) is not None:
        return _not_called(module, calls) if may_shrink else "it is factored already"
    if not isinstance(module, _PLAIN):
        return "a transposed convolution" if isinstance(module, nn.modules.conv._ConvTransposeNd) else ""
    return _special(module) or _touched(module, shared) or _not_called(module, calls) or _not_divisible(module, parts)


def _special(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        return "its weight is computed by a parametrization"
    if "weight" not in module._parameters:
        return "its weight is computed by a hook (`weight_norm`, a mask of `torch.nn.utils.prune`): make it permanent"
    if hasattr(module, "weight_fake_quant") or hasattr(module, "activation_post_process"):
        return "it is prepared for quantization: factor first, then quantize"
    if type(module) not in _PLAIN:
        return f"a {type(module).__name__}, whose forward is its own"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its rows are renormalized (`max_norm`)"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and module.in_channels == module.groups:
        return "depthwise: each filter reads one channel, so there is nothing to factor"
    return None


def _touched(module: nn.Module, shared: set[int]) -> str | None:
    if any(id(parameter) in shared for parameter in module.parameters()):
        return "its weight is used by another layer too"
    return None


def _not_called(module: nn.Module, calls: _Calls) -> str | None:
    return None if module in calls.positions else "it is not called as a layer in a forward pass"


def _not_divisible(module: nn.Module, parts: int) -> str | None:
    widths = {nn.Linear: "out_features", nn.MultiheadAttention: "embed_dim"}
    width = next((getattr(module, name) for kind, name in widths.items() if isinstance(module, kind)), None)
    if not parts or (width is not None and width % parts == 0):
        return None
    return f"neither a linear layer nor an attention whose outputs fall into {parts} equal parts"


def _layer(name: str, module: nn.Module, calls: _Calls, form: str) -> Layer:
    before, middle, after = calls.positions[module]
    done = factor_form(module)
    return Layer(
        name=name,
        forms=_forms(module, form) if done is None else (done,),
        weight=dense_weight(module),
        limits=None if done is None else current_ranks(module),
        positions=(before, middle, after),
        shape=calls.shapes[module],
    )


def _inside(name: str, module: nn.Module, parts: int, calls: _Calls) -> list[Layer]:
    before, middle, after = calls.positions[module]
    return [
        Layer(
            f"{name}.{part}",
            ("linear",),
            weight.detach()[None],
            None,
            (before, middle, after),
            name,
            parts,
            (*calls.shapes[module][:-1], weight.shape[1]),
        )
        for part, weight in opened_weights(module, parts).items()
    ]


def _forms(module: nn.Module, form: str) -> tuple[str, ...]:
    if not isinstance(module, nn.modules.conv._ConvNd):
        return ("embedding",) if isinstance(module, nn.Embedding) else ("linear",)
    wide = [size for size in module.kernel_size if size > 1]
    if not wide:
        return ("channel",)
    fitting = ["channel", "tucker2", *(["spatial"] if len(wide) == 2 == len(module.kernel_size) else [])]
    return tuple(fitting) if form == "auto" else (form if form in fitting else "channel",)


def _positions(module: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    form = factor_form(module)
    if isinstance(module, nn.Embedding) or form == "embedding":
        return x.numel(), x.numel(), x.numel()
    if isinstance(module, nn.modules.conv._ConvNd) or form in {"channel", "spatial", "tucker2"}:
        dims = len(_kernel(module))
        inside, outside = x.shape[-dims:], y.shape[-dims:]
        batch = x.shape[0] if x.dim() == dims + 2 else 1
        middle = outside[0] * inside[1] if dims == 2 else math.prod(outside)
        return batch * math.prod(inside), batch * middle, batch * math.prod(outside)
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


def _run(model: nn.Module, example: ExampleInput) -> _Calls:
    """One forward pass in evaluation mode, watched."""
    calls = _Calls(example.samples)
    with isolated(model), ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (*_PLAIN, nn.MultiheadAttention)) or factor_form(module):
                stack.callback(module.register_forward_hook(calls.look).remove)
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        model(*example.args, **example.kwargs)
    return calls
