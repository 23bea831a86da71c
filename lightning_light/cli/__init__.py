"""The command ``lightning-light``, the same as ``python -m lightning_light``, and `LightningLightCLI`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_light.cli.lightning_cli import LightningLightCLI as LightningLightCLI

__all__ = ["LightningLightCLI"]


def __getattr__(name: str) -> Any:
    """Import `LightningLightCLI` when it is used: the command's help needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import lightning_light.cli.lightning_cli

    return getattr(lightning_light.cli.lightning_cli, name)
