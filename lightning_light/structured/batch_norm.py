"""Re-estimate batch-norm statistics: after a cut they are those of another network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

__all__ = ["begin", "restore", "resume"]


def begin(model: nn.Module) -> dict[str, float]:
    """Forget all running statistics and average over the batches to come, equally; returns each layer's momentum."""
    momenta = {}
    for name, layer in _layers(model):
        if layer.momentum is not None:
            momenta[name] = float(layer.momentum)
            layer.reset_running_stats()
            layer.momentum = None
    return momenta


def resume(model: nn.Module, momenta: Mapping[str, float]) -> None:
    """Go on averaging in a run that continues from a checkpoint."""
    for name in momenta:
        model.get_submodule(name).momentum = None  # type: ignore[assignment]


def restore(model: nn.Module, momenta: Mapping[str, float]) -> None:
    """Go back to moving averages."""
    for name, momentum in momenta.items():
        model.get_submodule(name).momentum = momentum  # type: ignore[assignment]


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.modules.batchnorm._BatchNorm]]:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats:
            yield name, layer
