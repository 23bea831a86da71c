"""Find the parameter behind each weight of a layer: itself, or the one that a normalization computes it from.

Weight norm and spectral norm of ``torch.nn.utils`` exist in two generations, as forward pre-hooks and as
parametrizations. Both scale the elements of one parameter, so a zero of it is a zero of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_light.targets import Targets

__all__ = [
    "Norm",
    "TrainedWeight",
    "loose_parameters",
    "other_parametrizations",
    "trained_weights",
    "uncovered_parameters",
    "uncovered_text",
]

Norm = Literal["", "weight norm", "spectral norm"]

_LARGE = 0.01  # of all parameters
_PARAMETRIZATIONS: dict[type, tuple[Norm, str]] = {
    parametrizations._WeightNorm: ("weight norm", "original1"),
    parametrizations._SpectralNorm: ("spectral norm", "original"),
}


@dataclass(frozen=True, eq=False)
class TrainedWeight:
    """A weight of a layer, and the parameter that is trained for it.

    Attributes:
        tensor: name of the weight in the layer: ``"weight"``.
        parameter: the parameter itself, or what a norm scales: whole outputs by weight norm, all by spectral norm.
        norm: what the weight is computed by; empty for a plain parameter.
        dim: the axis whose entries weight norm scales, each by the norm of its slice; None for one norm of all.
        computed: returns the weight that the layer computes with, without gradient.
    """

    tensor: str
    parameter: nn.Parameter
    norm: Norm
    computed: Callable[[], Tensor]
    dim: int | None = None


def trained_weights(module: nn.Module, marks: Iterable[str] = ("weight",)) -> Iterator[TrainedWeight]:
    """Yield the weights of ``module`` itself: normalized ones, and parameters whose name contains one of ``marks``.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
        >>> [(found.tensor, found.norm, tuple(found.parameter.shape)) for found in trained_weights(layer)]
        [('weight', 'weight norm', (2, 4))]
    """
    hooked = set()
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            hooked |= {f"{hook.name}_g", f"{hook.name}_v"}
            direction: Any = module._parameters[f"{hook.name}_v"]
            compute = functools.partial(_read, hook.compute_weight, module)
            yield TrainedWeight(hook.name, direction, "weight norm", compute, _axis(hook.dim))
        elif isinstance(hook, SpectralNorm):
            hooked.add(f"{hook.name}_orig")
            original: Any = module._parameters[f"{hook.name}_orig"]
            compute = functools.partial(_read, hook.compute_weight, module, False)
            yield TrainedWeight(hook.name, original, "spectral norm", compute)
    for tensor, steps in _parametrized(module):
        found = _PARAMETRIZATIONS.get(type(steps[0])) if len(steps) == 1 else None
        if found is not None:
            trained = getattr(steps, found[1])
            dim = _axis(steps[0].dim) if found[0] == "weight norm" else None
            yield TrainedWeight(tensor, trained, found[0], functools.partial(_evaluated, steps), dim)
    for name, parameter in module._parameters.items():
        if parameter is not None and any(mark in name for mark in marks) and name not in hooked:
            yield TrainedWeight(name, parameter, "", parameter.detach)


def other_parametrizations(module: nn.Module) -> list[str]:
    """Return the names of the weights of ``module`` that another parametrization computes."""
    return [
        tensor
        for tensor, steps in _parametrized(module)
        if "weight" in tensor and (len(steps) != 1 or type(steps[0]) not in _PARAMETRIZATIONS)
    ]


def loose_parameters(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the large parameters of two or more axes that ``modules`` of the user's own classes hold, by name.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def __init__(self):
        ...         super().__init__(4, 2)
        ...         self.scale = nn.Parameter(torch.ones(2, 4))
        >>> net = nn.Sequential(nn.Linear(4, 4), Scaled())
        >>> list(loose_parameters(net, dict(net.named_modules())))
        ['1.weight', '1.scale']
    """
    large = _LARGE * sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in modules.items()
        if not type(module).__module__.startswith("torch.nn.")
        for name, parameter in module.named_parameters(recurse=False)
        if not is_lazy(parameter) and parameter.ndim >= 2 and parameter.numel() >= large
    }


def uncovered_text(names: list[str]) -> str:
    """Describe what `uncovered_parameters` found, for the log."""
    return f"not covered, in no layer with known weights: {names}"


def uncovered_parameters(model: nn.Module, targets: Targets, covered: Iterable[nn.Parameter]) -> list[str]:
    """Name the large parameters of two or more axes of ``targets``, in no layer of torch and not ``covered``."""
    ids = {id(parameter) for parameter in covered}
    loose = loose_parameters(model, targets.select(model, root=True))
    return [name for name, parameter in loose.items() if id(parameter) not in ids]


def _parametrized(module: nn.Module) -> Iterator[tuple[str, Any]]:
    if parametrize.is_parametrized(module):
        yield from module.parametrizations.items()  # type: ignore[union-attr, operator]  # a ModuleDict


def _axis(dim: int | None) -> int | None:
    return None if dim == -1 else dim  # of torch: one norm of the whole tensor


@torch.no_grad()
def _read(compute: Callable[..., Tensor], *args: Any) -> Tensor:
    return compute(*args)


@torch.no_grad()
def _evaluated(steps: nn.Module) -> Tensor:
    """Compute a parametrized tensor in evaluation mode: in training mode spectral norm updates its vectors."""
    modes = {part: part.training for part in steps.modules()}
    try:
        weight: Tensor = steps.eval()()
        return weight
    finally:
        for part, mode in modes.items():
            part.training = mode
