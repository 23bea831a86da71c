"""Gather what a data-dependent criterion needs, from the batches that training draws anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.criteria.evidence import Criterion
from lightning_light.structured.scores import Gathered

__all__ = ["ActivationWatch", "add_gradients", "mean_evidence"]

Sums = dict[str, dict[str, Tensor]]
"""Kind of evidence -> tensor or layer name -> running sum, with its count under the key ``"#" + name``."""


def add_gradients(sums: Sums, model: nn.Module, criterion: Criterion, parameters: Iterable[nn.Parameter]) -> None:
    """Add the gradients of one optimizer step, as they stand before clipping.

    Args:
        sums: changed in place.
        model: names the parameters.
        criterion: says what is needed.
        parameters: those that this step is about to change.
    """
    mine = set(parameters)
    for name, parameter in model.named_parameters():
        if parameter in mine and parameter.grad is not None:
            gradient = parameter.grad.detach()
            if "grad" in criterion.needs:
                _add(sums, "grad", name, gradient)
            if "grad_squared" in criterion.needs:
                _add(sums, "grad_squared", name, gradient.float().square())


def mean_evidence(sums: Sums) -> Gathered:
    """Means of what was gathered."""
    means: dict[str, dict[str, Tensor]] = {}
    for kind, entries in sums.items():
        named = {name: total for name, total in entries.items() if not name.startswith("#")}
        means[kind] = {name: total / entries[f"#{name}"] for name, total in named.items()}
    return Gathered(means.get("grad", {}), means.get("grad_squared", {}), means.get("activation", {}))


def _add(sums: Sums, kind: str, name: str, value: Tensor) -> None:
    entries = sums.setdefault(kind, {})
    entries[name] = entries[name].to(value.device) + value if name in entries else value.clone()
    entries[f"#{name}"] = entries.get(f"#{name}", torch.zeros(())) + 1


class ActivationWatch:
    """Forward hooks that add up the mean absolute output of every layer with weights, in training."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: Sums = {}
        self._handles = [
            module.register_forward_hook(self._hook(name, module))
            for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), Tensor) and not list(module.children())
        ]

    def move_to(self, sums: Sums, reduce: Callable[[Tensor], Tensor]) -> None:
        """Hand over what was seen since the last call; ``reduce`` takes the mean over processes.

        Done batch by batch, so that a checkpoint, which one process writes, holds what all have seen.
        """
        for kind, entries in self._seen.items():
            target = sums.setdefault(kind, {})
            for name, own in entries.items():
                value = own if name.startswith("#") else reduce(own)
                target[name] = target[name].to(value.device) + value if name in target else value
        self._seen.clear()

    def forget(self) -> None:
        """Drop what was seen since the last call of `move_to`."""
        self._seen.clear()

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, layer: nn.Module) -> Callable[..., None]:
        dim = -1 if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.Embedding)) else 1

        def look(module: nn.Module, args: Any, output: Any) -> None:
            if module.training and isinstance(output, Tensor) and output.dim() > 1:
                channels = output.detach().float().abs().movedim(dim, 0).flatten(1)
                _add(self._seen, "activation", name, channels.mean(dim=1))

        return look
