"""Where a rounded network is evaluated its layers compute what the runtimes do, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_light.quantization.lowering.means import mean_of_whole_numbers
from lightning_light.quantization.lowering.norms import affine_of
from lightning_light.quantization.lowering.sums import in_whole_numbers, kernels_of
from lightning_light.quantization.lowering.weights import Scale, folded
from lightning_light.quantization.operations import arguments
from lightning_light.quantization.places import module_of
from lightning_light.quantization.plan import Plan
from lightning_light.quantization.rules import Grid, WeightRule

__all__ = ["Evaluated", "FoldedLayer"]

_EPS = 1e-5  # of `batch_norm`, where none is given
_OF_NORM: Final = ("running_mean", "running_var", "weight", "bias")


@dataclass
class FoldedLayer:
    """A layer that has computed for the batch norm after it, too.

    Attributes:
        key: its name.
        function: the operation.
        args: its arguments, with the weight as it was given.
        kwargs: likewise.
        norm: arguments of the batch norm, by name.
    """

    key: str
    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    norm: Mapping[str, Any]

    def is_followed_by(self, norm: Mapping[str, Any]) -> bool:
        """Whether a batch norm is called with what was expected; one with a `forward` of its own need not be."""
        same = all(norm.get(name) is self.norm[name] for name in _OF_NORM)
        return same and not norm.get("training") and norm.get("eps", _EPS) == self.norm["eps"]


class Evaluated:
    """Computes layers in whole numbers, with the batch norm that follows folded in.

    In float the same sum comes out a little different, and one number in some hundred thousand lies so near to a half
    that it falls on the other side; layer by layer they become many. The batch norm has to be known before its turn:
    it is, if it is a module. A layer before one that is called as a function computes as it is written, and so does
    one whose numbers are not float32.

    Args:
        plan: of the network.
        engine: whose rules.
    """

    def __init__(self, plan: Plan, engine: str) -> None:
        self._plan, self._engine = plan, engine
        self._called: tuple[str, nn.Module] | None = None
        self._folded: dict[str, FoldedLayer] = {}  # batch norm -> its layer

    def begin(self, called: tuple[str, nn.Module] | None) -> None:
        """A forward pass of this module begins, or none; the last one may have been left in the middle."""
        self._called, self._folded = called, {}

    def layer(
        self,
        key: str,
        name: str,
        function: Any,
        args: list[Any],
        kwargs: dict[str, Any],
        rule: tuple[WeightRule, Tensor | None],
        scales: list[Scale | None],
        grids: list[Grid],
    ) -> Tensor | None:
        """What a layer and all of its group give, rounded; None if it has to be computed as it is written.

        Args:
            key: its name.
            name: of the operation.
            function: the operation itself.
            args: its arguments.
            kwargs: likewise.
            rule: how its weight is rounded, and the scale if that is learned.
            scales: of the plan's grids.
            grids: those grids.
        """
        group, given = self._plan.groups[key], arguments(name, args, kwargs)
        place = self._plan.outputs[group.tail]
        reads, writes = scales[self._plan.reads[key]], scales[place]
        norm = None if group.batch_norm is None else self._norm(group.batch_norm)
        if reads is None or writes is None or (group.batch_norm is not None and norm is None):
            return None
        if given["input"].dtype is not torch.float32 or given["weight"].dtype is not torch.float32:
            return None
        weight = folded(given, norm, *rule, reads[0], writes[0])
        if weight.is_too_coarse(reads[0], writes[0]):
            return None
        if group.batch_norm is not None and norm is not None:
            self._folded[group.batch_norm] = FoldedLayer(key, function, list(args), dict(kwargs), norm)
        return in_whole_numbers(
            function,
            list(args),
            dict(kwargs),
            weight,
            reads,
            writes,
            grids[place].high,
            kernels_of(self._engine, name, given),
        )

    def mean(
        self, key: str, function: Any, args: list[Any], kwargs: dict[str, Any], scales: list[Scale | None]
    ) -> Tensor | None:
        """What an average pool gives, rounded; None if it has to be computed as it is written."""
        scale, x = scales[self._plan.outputs[key]], args[0] if args else kwargs["input"]
        if scale is None or x.dtype is not torch.float32:
            return None
        return mean_of_whole_numbers(function, list(args), dict(kwargs), scale[0])

    def norm(self, args: Mapping[str, Any]) -> Tensor | None:
        """What a batch norm gives that follows no layer; None if it has to be computed as it is written."""
        found = affine_of(args)
        return None if found is None else args["input"] * found[0] + found[1]

    def layer_before(self, key: str) -> FoldedLayer | None:
        """The layer that has computed for the batch norm ``key``, if one has."""
        return self._folded.pop(key, None)

    def _norm(self, key: str) -> dict[str, Any] | None:
        module = self._module(module_of(key))
        if module is None or module.training or module.running_mean is None:
            return None
        return {name: getattr(module, name) for name in _OF_NORM} | {"eps": module.eps}

    def _module(self, path: str) -> _BatchNorm | None:
        """The batch norm at ``path``, if it is one: of the network that is called, which may be a copy."""
        if self._called is None:
            return None
        called: Any
        name, called = self._called
        inside = path.removeprefix(f"{name}.") if name else path
        for step in inside.split("."):
            called = getattr(called, "_modules", {}).get(step)
        return called if isinstance(called, _BatchNorm) else None
