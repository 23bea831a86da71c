"""Find residual blocks, remove them, and replay that on a structure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated, observe
from lightning_light.order import Stage
from lightning_light.surgery.operations import register_operation
from lightning_light.surgery.replace import put_module, replace_modules
from lightning_light.surgery.trial import temporarily_replaced
from lightning_light.targets import Targets

__all__ = ["Blocks", "METHOD", "RemovedBlock", "find_blocks", "remove_blocks", "without_blocks"]

METHOD = "depth_pruning"
REMOVE = "depth_pruning/remove"

_replace = partial(replace_modules, method=METHOD, stage=Stage.DEPTH)

_TOLERANCE = 1e-5


class RemovedBlock(nn.Module):
    """Return the first argument: what is left of a residual block."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``x``."""
        return x


@dataclass(frozen=True)
class Blocks:
    """Which residual blocks of a model can be removed.

    Attributes:
        names: in the order in which they are called.
        kept: name of every other module that was considered -> the reason why it is kept.
    """

    names: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    count: int = 1


def find_blocks(model: nn.Module, example: ExampleInput, targets: Targets) -> Blocks:
    """Find the innermost modules that compute ``x + f(x)``, where the shape stays the same.

    A module is a residual block if its output equals its first argument once all its parameters are zero.

    Args:
        model: left as it is.
        example: one call of the model.
        targets: modules among them are considered.

    Raises:
        TargetError: ``targets`` match no module.
    """
    modules = {
        name: module
        for name, module in targets.select(model).items()
        if name and next(module.children(), None) is not None and next(module.parameters(), None) is not None
    }
    calls = _record_calls(model, modules, example)
    names: list[str] = []
    kept: dict[str, str] = {}
    with isolated(model):
        for name in sorted(modules, key=lambda name: -name.count(".")):  # innermost first
            if any(inner.startswith(f"{name}.") for inner in names):
                continue
            reason = _reason(modules[name], calls.get(name)) or _failure(model, name, example)
            if reason is None:
                names.append(name)
            else:
                kept[name] = reason
    order = list(calls)
    return Blocks(
        sorted(names, key=order.index),
        {name: reason for name, reason in kept.items() if not any(name.startswith(f"{block}.") for block in names)},
    )


@contextmanager
def without_blocks(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Run ``model`` without the named blocks; everything is back at the end of the ``with`` statement."""
    with temporarily_replaced(model, {name: RemovedBlock() for name in names}):
        yield


def remove_blocks(model: nn.Module, names: Sequence[str], **followers: Any) -> dict[str, Any]:
    """Remove residual blocks in place; their parameters leave the optimizers.

    Args:
        model: the live model.
        names: of the blocks.
        **followers: ``optimizers`` and ``averaged_models``, as in `replace_modules`.

    Returns:
        The edit log's entry.

    Raises:
        SurgeryError: see `replace_modules`; nothing is changed.
        UnsupportedError: a later method owns a layer of a block; nothing is changed.
    """
    blocks = {name: model.get_submodule(name) for name in names}
    inside = {id(module) for block in blocks.values() for module in block.modules()}
    elsewhere = {id(p) for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)}
    leaving = [p for block in blocks.values() for p in block.parameters() if id(p) not in elsewhere]
    _replace(model, {name: RemovedBlock() for name in names}, parameters=dict.fromkeys(leaving, ()), **followers)
    return {"op": REMOVE, "blocks": list(names)}


@register_operation(REMOVE)
def replay_remove(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Remove the blocks of a structure."""
    for name in entry["blocks"]:
        put_module(model, name, RemovedBlock())


def _record_calls(model: nn.Module, modules: Mapping[str, nn.Module], example: ExampleInput) -> dict[str, _Call]:
    """Record the first call of each module in one forward pass, in the order of their ends."""
    calls: dict[str, _Call] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if name in calls:
            calls[name].count += 1
        else:
            calls[name] = _Call(args, kwargs, output)

    observe(model, modules, [example], record)
    return calls


def _reason(module: nn.Module, call: _Call | None) -> str | None:
    """Why ``module`` cannot be removed."""
    if call is None:
        return "not called in a forward pass"
    if call.count > 1:
        return f"called {call.count} times per forward pass"
    x, output = next(iter(call.args), None), call.output
    if not isinstance(x, Tensor) or not isinstance(output, Tensor):
        found = type(output if isinstance(x, Tensor) else x).__name__
        return f"expected one tensor in and one out, found {found}"
    if x.shape != output.shape:
        return f"changes the shape of its input: {tuple(x.shape)} -> {tuple(output.shape)}"
    zeros = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    alone = functional_call(module, zeros, call.args, call.kwargs)
    if not torch.allclose(alone, x, rtol=_TOLERANCE, atol=_TOLERANCE):
        return "not a residual block: with zero weights its output is not its input"
    return None


def _failure(model: nn.Module, name: str, example: ExampleInput) -> str | None:
    """Why ``model`` does not run without the block ``name``: its code may read attributes of it."""
    try:
        with without_blocks(model, [name]):
            model(*example.args, **example.kwargs)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"the model does not run without it ({type(error).__name__}: {error})"
    return None
