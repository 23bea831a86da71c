"""Correct batch-norm statistics after a network was changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_light.example_input import ExampleInput
from lightning_light.host.modules import compiled_methods, is_step_call
from lightning_light.host.patches import RunHook
from lightning_light.isolation import isolated
from lightning_light.surgery.edit import take
from lightning_light.surgery.manifest import plain_copy

__all__ = [
    "SAMPLES",
    "InputRecorder",
    "Statistics",
    "has_statistics",
    "layers_with_statistics",
    "measure_statistics",
    "move_statistics",
    "scale_and_shift",
]

SAMPLES = 16


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and variance of the inputs of one batch-norm layer, shape ``(channels,)`` each, on the CPU."""

    mean: Tensor
    var: Tensor


def measure_statistics(model: nn.Module, inputs: Sequence[ExampleInput]) -> dict[str, Statistics]:
    """Measure the batch statistics of every batch-norm layer, averaged over ``inputs``.

    Each layer normalizes with the statistics of its batch, as in training; everything else is in evaluation mode, and
    the model is unchanged afterwards. On one process alone: no layer communicates.

    Args:
        model: any module.
        inputs: calls of ``model``, one per batch.

    Returns:
        Module name -> its statistics, for the layers that keep running statistics and were reached.
    """
    layers = dict(layers_with_statistics(model)) if inputs else {}
    if not layers:
        return {}
    found: dict[str, list[Statistics]] = {name: [] for name in layers}
    with isolated(model), _recording(layers, found):
        for call in inputs:
            model(*call.args, **call.kwargs)
    return {name: _average(batches) for name, batches in found.items() if batches}


@torch.no_grad()
def move_statistics(
    model: nn.Module,
    before: Mapping[str, Statistics],
    after: Mapping[str, Statistics],
    kept: Mapping[str, Mapping[int, Tensor]],
) -> None:
    """Move running statistics by what a change of the network did to the batch statistics.

    ``running_mean += after.mean - before.mean`` and ``running_var *= (after.var + eps) / (before.var + eps)``: an
    unchanged network keeps exactly the statistics it has, which re-estimation from a few batches would replace.

    Args:
        model: the network after the change, or an averaged copy of it.
        before: statistics of the network before the change.
        after: statistics of the changed network, measured on the same inputs.
        kept: tensor name -> dimension -> positions that stayed, where channels were removed.
    """
    for name, layer in layers_with_statistics(model):
        if name not in before or name not in after:
            continue
        assert layer.running_mean is not None  # of `layers_with_statistics`
        assert layer.running_var is not None
        prefix = f"{name}." if name else ""
        mean = take(before[name].mean, kept.get(f"{prefix}running_mean", {}))
        var = take(before[name].var, kept.get(f"{prefix}running_var", {}))
        layer.running_mean.add_((after[name].mean - mean).to(layer.running_mean))
        layer.running_var.mul_(((after[name].var + layer.eps) / (var + layer.eps)).to(layer.running_var))


def scale_and_shift(
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(scale, shift)``, with which the batch norm of ``x + before`` is ``x * scale + shift``.

    Args:
        mean: that it normalizes with, per channel.
        var: that it normalizes with, per channel.
        eps: that is added to ``var``.
        weight: of the batch norm; None for 1.
        bias: of the batch norm; None for 0.
        before: the bias of the layer before it; None for 0.

    Example:
        >>> scale_and_shift(torch.tensor([1.0]), torch.tensor([4.0]), 0.0, torch.tensor([3.0]), torch.tensor([0.5]))
        (tensor([1.5000]), tensor([-1.]))
    """
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    centered = (0.0 if before is None else before) - mean
    return scale, (0.0 if bias is None else bias) + centered * scale


def has_statistics(model: nn.Module) -> bool:
    """Check whether ``model`` has a batch-norm layer that keeps running statistics."""
    return any(True for _ in layers_with_statistics(model))


class InputRecorder:
    """Record what a module is called with in training: the first call per batch.

    A module compiled as a whole is not recorded: its hooks would become part of the compiled code.

    Args:
        model: the module.
        samples: how many samples of a call are recorded; None for all.

    Attributes:
        active: whether calls are recorded.
    """

    def __init__(self, model: nn.Module, samples: int | None = SAMPLES) -> None:
        self._samples = samples
        self.active = False
        self._call: dict[str, Any] | None = None
        compiled = vars(model).get("_compiled_call_impl") is not None or compiled_methods(model)
        hook = None if compiled else model.register_forward_pre_hook(RunHook(self._record), with_kwargs=True)
        self._handle = hook

    def take(self) -> list[dict[str, Any]]:
        """Return the call recorded since the last ``take``, in plain types, for `ExampleInput`; empty without one."""
        call, self._call = self._call, None
        return [] if call is None else [call]

    def remove(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active or self._call is not None or not module.training or is_step_call(module):
            return
        call = ExampleInput(args, kwargs).small(self._samples)
        try:
            self._call = plain_copy({"args": call.args, "kwargs": call.kwargs}, "inputs")
        except TypeError:  # an object of the user's, which a checkpoint could not hold
            self.active = False


def layers_with_statistics(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield the batch-norm layers that keep running statistics, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.running_mean is not None:
            yield name, layer


@contextmanager
def _recording(layers: Mapping[str, _BatchNorm], found: Mapping[str, list[Statistics]]) -> Iterator[None]:
    """Let each layer normalize with the statistics of its batch, and record them."""

    def record(name: str) -> Any:
        def hook(layer: _BatchNorm, args: tuple[Tensor, ...]) -> None:
            values = args[0].detach().movedim(1, 0).flatten(1).float()
            var, mean = torch.var_mean(values, dim=1, correction=0)
            found[name].append(Statistics(mean, var))
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)

        return hook

    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _average(batches: list[Statistics]) -> Statistics:
    mean = torch.stack([batch.mean for batch in batches]).mean(dim=0)
    var = torch.stack([batch.var for batch in batches]).mean(dim=0)
    return Statistics(mean.cpu(), var.cpu())
