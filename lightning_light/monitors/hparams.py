"""How the run was compressed, among its hyper-parameters: in the one record that every logger keeps."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from lightning_light.callback import CompressionCallback
from lightning_light.order import Stage

__all__ = ["method_hparams"]


def method_hparams(callbacks: Iterable[object]) -> dict[str, Any]:
    """The arguments of every method in the list but monitors, as ``<method>/<argument>``; by ``repr`` if not plain."""
    return {
        f"{type(callback).method}/{name}": _plain(getattr(callback, name))
        for callback in callbacks
        if isinstance(callback, CompressionCallback) and callback.stage != Stage.MONITORS
        for name in inspect.signature(type(callback).__init__).parameters
        if name != "self" and hasattr(callback, name)
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else repr(value)
