"""Record which method works on which layers, and refuse changes that a later method's layers cannot follow.

A chain of methods goes by `lightning_light.order.Stage`: channels are removed, then weights are masked, then layers are
factored, then weights are clustered or quantized. A layer that a later method has claimed is refused to an earlier one,
whether callbacks or functions ask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor, nn

from lightning_light.errors import UnsupportedError

__all__ = ["Claim", "PlainClaim", "all_names", "layers_of", "refuse_owned"]


class PlainClaim(TypedDict):
    """A claim as it is stored in a manifest."""

    stage: int
    layers: list[str]
    follows_cuts: bool


@dataclass(frozen=True)
class Claim:
    """Layers that a method works on.

    Attributes:
        method: key of the method's state, for instance ``"weight_pruning"``; a second callback has a ``#2`` behind it.
        stage: of `lightning_light.order.Stage`.
        layers: names of modules; what lies inside them is claimed as well.
        follows_cuts: whether what the method keeps for a layer stays right when channels are cut: because the method
            follows the cut, or because it keeps nothing.
    """

    method: str
    stage: int
    layers: tuple[str, ...]
    follows_cuts: bool = False

    def covers(self, layer: str) -> bool:
        """Whether ``layer`` is a claimed module or lies inside one."""
        return any(layer == own or not own or layer.startswith(f"{own}.") for own in self.layers)

    def lies_in(self, layer: str) -> bool:
        """Whether a claimed module lies inside ``layer``."""
        return any(own != layer and (not layer or own.startswith(f"{layer}.")) for own in self.layers)

    def is_of(self, method: str) -> bool:
        """Whether ``method``, or another callback of its kind, holds the claim."""
        return self.method.partition("#")[0] == method.partition("#")[0]

    def encode(self) -> PlainClaim:
        """Return plain types."""
        return {"stage": int(self.stage), "layers": list(self.layers), "follows_cuts": self.follows_cuts}

    @classmethod
    def decode(cls, method: str, plain: PlainClaim) -> Claim:
        """Read what `encode` has written."""
        return cls(method, plain["stage"], tuple(plain["layers"]), plain["follows_cuts"])


def all_names(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return ``layers`` under all the names that their modules have in ``model``."""
    wanted = set(layers)
    modules = dict(model.named_modules(remove_duplicate=False))
    shared = {id(modules[layer]) for layer in wanted & modules.keys()}
    return [name for name, module in modules.items() if id(module) in shared] + sorted(wanted - modules.keys())


def layers_of(model: nn.Module, tensors: Iterable[Tensor]) -> list[str]:
    """Return the names of all modules, under all their names, that hold one of ``tensors`` themselves."""
    wanted = {id(tensor) for tensor in tensors}
    return [
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if any(id(held) in wanted for held in (*module._parameters.values(), *module._buffers.values()))
    ]


def refuse_owned(
    claims: Iterable[Claim], layers: Iterable[str], *, method: str, stage: int, replaces: bool = False
) -> None:
    """Refuse to let ``method`` change ``layers`` if a method that comes later, or another of the same stage, owns one.

    Args:
        claims: those of the model.
        layers: names of the modules that are about to change, as of `all_names`.
        method: the one that is about to change them.
        stage: its stage.
        replaces: whether modules are replaced; a claim that follows cuts does not follow that.

    Raises:
        UnsupportedError: names the layer, its owner, and the right order.
    """
    layers = list(layers)
    for claim in claims:
        if claim.is_of(method) or claim.stage < stage or (claim.follows_cuts and not replaces):
            continue
        owned = [layer for layer in layers if claim.covers(layer) or (replaces and claim.lies_in(layer))]
        if owned:
            owner = claim.method.partition("#")[0]
            order = (
                f"Use `{method}` first and `{owner}` afterwards, on a network that `{owner}` has not changed yet"
                if claim.stage > stage
                else "Use one of the two on a layer"
            )
            raise UnsupportedError(
                f"`{method}` on `{owned[0]}`: expected a layer that no other method works on, found one that `{owner}` "
                f"owns ({len(owned)} such layers). {order}, or exclude the layers: "
                f"`targets=Targets(exclude={owned[:3]})`."
            )
