"""Select a tensor of a batch or of a network's output, by key, position or function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Selector", "labels_of", "select"]

Selector = str | int | Callable[[Any], Any] | None
"""A key or attribute, a position, a function, or None for the value itself."""

_LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def select(value: Any, selector: Selector, call: str) -> Tensor:
    """Select the tensor that ``selector`` names in ``value``.

    Args:
        value: an output or a batch.
        selector: see `Selector`.
        call: the argument as the user wrote it, for the message: ``KnowledgeDistillation(output='logits')``.

    Raises:
        ValueError: there is no such part, or it is not a tensor. The message lists the available parts.

    Example:
        >>> select({"logits": torch.ones(2)}, "logits", "KnowledgeDistillation(output='logits')").tolist()
        [1.0, 1.0]
    """
    found = _pick(value, selector)
    if isinstance(found, Tensor):
        return found
    raise ValueError(
        f"`{call}`: expected to find a tensor, found {'nothing' if found is None else type(found).__name__} in a "
        f"{type(value).__name__} with {_parts(value)}. Give a key, a position or a function, for instance 'logits'."
    )


def labels_of(batch: Any, selector: Selector, call: str) -> Tensor:
    """Select the labels of a batch: by default its second part, or the key ``labels``, ``target`` or ``y``.

    Args:
        batch: a tuple, list or mapping.
        selector: see `Selector`.
        call: see `select`.

    Raises:
        ValueError: see `select`.

    Example:
        >>> labels_of((torch.zeros(3, 2), torch.tensor([0, 1, 1])), None, "KnowledgeDistillation()").tolist()
        [0, 1, 1]
    """
    if selector is None and isinstance(batch, Mapping):
        selector = next((name for name in _LABEL_KEYS if name in batch), None)
    elif selector is None and isinstance(batch, list | tuple) and len(batch) > 1:
        selector = 1
    return select(batch, selector, call)


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
