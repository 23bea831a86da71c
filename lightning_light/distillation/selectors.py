"""Selectors: how a user says which part of a batch, or of an output, is meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Selector", "labels_of", "select"]

Selector = str | int | Callable[[Any], Any] | None
"""A key or attribute, a position, a function, or None for the thing itself."""

_LABELS = ("labels", "label", "targets", "target", "y")


def select(value: Any, selector: Selector, argument: str) -> Tensor:
    """The tensor that ``selector`` names in ``value``.

    Args:
        value: an output or a batch.
        selector: see `Selector`.
        argument: what the user calls the selector, for the sentence.

    Raises:
        ValueError: there is no such part, or it is not a tensor. The message lists what there is.

    Example:
        >>> select({"logits": torch.ones(2)}, "logits", "output").tolist()
        [1.0, 1.0]
    """
    found = _pick(value, selector)
    if isinstance(found, Tensor):
        return found
    keys = f"{type(value).__name__} with {_parts(value)}"
    raise ValueError(
        f"`KnowledgeDistillation({argument}={selector!r})`: expected to find a tensor, found "
        f"{'nothing' if found is None else type(found).__name__} in a {keys}. Give a key, a position or a function, "
        f"for instance `{argument}='logits'`."
    )


def labels_of(batch: Any, selector: Selector) -> Tensor:
    """The labels of a batch; without a selector its second part, or what is called labels or the like."""
    if selector is None and isinstance(batch, Mapping):
        selector = next((name for name in _LABELS if name in batch), None)
    elif selector is None and isinstance(batch, list | tuple) and len(batch) > 1:
        selector = 1
    return select(batch, selector, "labels")


def _pick(value: Any, selector: Selector) -> Any:
    if selector is None:
        return value
    if callable(selector):
        return selector(value)
    if isinstance(selector, int):
        return value[selector] if isinstance(value, list | tuple) and -len(value) <= selector < len(value) else None
    return value.get(selector) if isinstance(value, Mapping) else getattr(value, selector, None)


def _parts(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"keys {list(value)}"
    return f"{len(value)} parts" if isinstance(value, list | tuple) else "no parts"
