"""What is learned of the grids: its first values, and its place in the user's optimizers.

It is no part of the LightningModule: its state dict, its averaged copies and DDP's buckets do not know it. The values
are in the method's state, so that checkpoints have them; the optimizer that trains a layer trains its grids, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_light.errors import UnsupportedError
from lightning_light.quantization.learning import SMALLEST
from lightning_light.quantization.places import module_of
from lightning_light.quantization.plan import Plan
from lightning_light.quantization.rules import Grid
from lightning_light.surgery.distributed import reduce_mean
from lightning_light.surgery.optimizer import adopt, disown, unwrap

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Learned", "first_step", "first_values", "learned_scale", "names_of"]

_OWN = {"step": ("step",), "step and offset": ("step", "offset"), "clip": ("clip",)}


def names_of(place: int, grid: Grid) -> list[str]:
    """What is learned of the grid at ``place``, by the name under which it is kept.

    Example:
        >>> names_of(3, Grid(learned="step and offset"))
        ['grid 3 step', 'grid 3 offset']
    """
    return [f"grid {place} {what}" for what in _OWN.get(grid.learned, ())]


def first_step(w: Tensor, high: int, per_channel: bool) -> Tensor:
    """``2 * mean|w| / sqrt(high)``, of each output channel or of all; zeros of a mask do not count."""
    magnitude = w.detach().float().abs()
    magnitude = magnitude.flatten(1) if per_channel else magnitude.flatten()
    mean = magnitude.sum(-1) / (magnitude > 0).sum(-1).clamp_min(1)
    first: Tensor = 2.0 * mean / max(high, 1) ** 0.5
    return first.clamp_min(SMALLEST)


def first_values(grids: Sequence[Grid], scales: Sequence[tuple[float, int] | None]) -> dict[str, Tensor]:
    """Of every grid that is learned and has been observed: what its observed range says.

    Args:
        grids: of a plan.
        scales: as observed.
    """
    found: dict[str, Tensor] = {}
    for place, (grid, observed) in enumerate(zip(grids, scales, strict=True)):
        if observed is None:
            continue
        scale, zero = observed
        values = {"step": scale, "offset": -scale * zero, "clip": scale * grid.high}
        for name in names_of(place, grid):
            found[name] = torch.tensor(values[name.split()[-1]])
    return found


def learned_scale(learned: Mapping[str, Tensor], place: int, grid: Grid) -> tuple[float, int] | None:
    """Scale and zero point of the grid at ``place``, as learned so far; None where nothing is learned of it."""
    values = [learned[name].detach() for name in names_of(place, grid) if name in learned]
    if not values:
        return None
    if grid.learned == "clip":
        return float(values[0].clamp_min(SMALLEST) / grid.high), 0
    scale = values[0].abs().clamp_min(SMALLEST)
    if grid.learned == "step":
        return float(scale), 0 if grid.positive else (grid.high + 1) // 2
    return float(scale), int((-values[1] / scale).round().clamp(0, grid.high))


class Learned:
    """Parameters for what is learned of ``plan``'s grids, each with the optimizer of its layer.

    Args:
        state: of the method; its ``learned`` has the values, and shares their memory from now on.
        plan: whose grids they are.
        model: the live module.
        optimizers: of the run.

    Raises:
        UnsupportedError: no optimizer takes parameters during a run.
    """

    def __init__(self, state: dict[str, Any], plan: Plan, model: nn.Module, optimizers: Iterable[Any]) -> None:
        self._optimizers = [unwrap(optimizer) for optimizer in optimizers]
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.parameters = {name: nn.Parameter(value.to(device).clone()) for name, value in state["learned"].items()}
        places: dict[str, list[int]] = state.setdefault("groups", {})
        homes = _homes(plan)
        for name, parameter in self.parameters.items():
            state["learned"][name] = parameter.detach()
            if name not in places:
                places[name] = self._place(model, homes[name])
            optimizer, group = places[name]
            adopt(self._optimizers[optimizer].param_groups[group], parameter, f"quantization.{name}")

    def _place(self, model: nn.Module, home: str) -> list[int]:
        """The optimizer that changes the module at ``home``, and in it the group with the least weight decay."""
        wanted = [{id(p) for p in module.parameters()} for module in (model.get_submodule(home), model)]
        for mine in wanted:
            for place, optimizer in enumerate(self._optimizers):
                groups = optimizer.param_groups
                if isinstance(optimizer, torch.optim.LBFGS) or not any(
                    id(p) in mine for g in groups for p in g["params"]
                ):
                    continue
                decays = [float(group.get("weight_decay", 0.0)) for group in groups]
                return [place, decays.index(min(decays))]
        raise UnsupportedError(
            "`QuantizationAwareTraining` with step sizes that are learned: expected an optimizer of the module that "
            f"takes parameters during a run, found {[type(one).__name__ for one in self._optimizers] or 'none'}. Train "
            "with `SGD` or `AdamW`, or take a recipe that observes: `IntN(...)`."
        )

    def reduce(self, trainer: Trainer) -> None:
        """DDP does not know the parameters: take the mean of their gradients over all ranks."""
        parameters = list(self.parameters.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if not gradients:
            return
        mean = reduce_mean(trainer, torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(mean, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def discard(self) -> None:
        """Take the parameters back from the optimizers, if they have them."""
        for optimizer in self._optimizers:
            for parameter in self.parameters.values():
                disown(optimizer, parameter)


def _homes(plan: Plan) -> dict[str, str]:
    """Name of what is learned -> path of the module that it belongs to."""
    homes = {key: module_of(key) for key in plan.weights}
    sites = [(key, grid) for key, places in plan.arguments.items() for grid in places.values()]
    for key, grid in [*sites, *plan.outputs.items()]:
        for name in names_of(grid, plan.grids[grid]):
            homes.setdefault(name, module_of(key))
    return homes
