"""Collect the arguments of the compression methods as hyper-parameters for loggers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from lightning_light.callback import CompressionCallback
from lightning_light.order import Stage

__all__ = ["method_hparams"]


def method_hparams(callbacks: Iterable[object]) -> dict[str, Any]:
    """Return the arguments of every method except monitors, as ``<method>/<argument>``; their ``repr`` if not plain."""
    return {
        f"{type(callback).method}/{name}": _plain(getattr(callback, name))
        for callback in callbacks
        if isinstance(callback, CompressionCallback) and callback.stage != Stage.MONITORS
        for name in inspect.signature(type(callback).__init__).parameters
        if name != "self" and hasattr(callback, name)
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else repr(value)
