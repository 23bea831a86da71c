"""Find out which convolutions are plain, trained layers of `torch.nn` that others can replace, and make others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_light.merging import branch_of
from lightning_light.surgery.optimizer import unwrap

__all__ = ["POINTWISE", "convolution_like", "why_not_plain"]

POINTWISE: dict[str, Any] = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "padding_mode": "zeros"}
"""Options of a 1x1 convolution."""

_OPTIONS = ("in_channels", "out_channels", "groups", *POINTWISE)


def convolution_like(conv: Any, **changes: Any) -> Any:
    """Make a convolution with the options of ``conv`` except for ``changes``; without bias, its weight on ``meta``.

    Example:
        >>> convolution_like(nn.Conv2d(4, 8, 3, padding=1), out_channels=6)
        Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    make = getattr(nn, f"Conv{len(conv.kernel_size)}d")
    options = {name: getattr(conv, name) for name in _OPTIONS}
    return make(**{**options, "bias": False, "device": "meta", **changes})


def why_not_plain(model: nn.Module, optimizers: Iterable[Any] | None) -> Callable[[str, nn.Module], str | None]:
    """Return a function from the name of a convolution, and the layer, to the reason why it is not plain, or None.

    Args:
        model: any module.
        optimizers: those that train the model; None where that is not known.
    """
    trained = None if optimizers is None else {id(parameter) for parameter in _parameters(optimizers)}
    owners = _owners(model)

    def reason(name: str, module: nn.Module) -> str | None:
        weight = module._parameters.get("weight")
        if parametrize.is_parametrized(module) or not isinstance(weight, nn.Parameter):
            return "its weight is computed by a parametrization or a hook"
        if type(module) is not nn.Conv2d:
            return f"a {type(module).__name__}, not a Conv2d"
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r}"
        if len(owners[id(weight)]) > 1:
            return f"its weight is shared with {next(own for own in owners[id(weight)] if own != f'{name}.weight')}"
        if not weight.requires_grad:
            return "it is frozen"
        if trained is not None and id(weight) not in trained:
            return "no optimizer trains it"
        block = branch_of(model, name)
        return f"part of `{block}`, which merges branches of its own" if block else None

    return reason


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of each parameter, one for every module that holds it."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for own, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{path}.{own}" if path else own)
    return owners


def _parameters(optimizers: Iterable[Any]) -> Iterable[nn.Parameter]:
    groups = (group for optimizer in map(unwrap, optimizers) for group in optimizer.param_groups)
    return (parameter for group in groups for parameter in group["params"])
