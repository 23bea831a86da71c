"""Read and change the tensors in nested containers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["map_tensors", "tensors_in"]


def tensors_in(value: Any, *, objects: bool = False) -> Iterator[Tensor]:
    """Yield the tensors in dicts, lists, tuples, other mappings and dataclasses, in order.

    Args:
        value: a tensor, or a container of any depth.
        objects: look at the attributes of other objects too.

    Example:
        >>> [int(x) for x in tensors_in(({"b": torch.tensor(1), "a": torch.tensor(2)}, "flag", [torch.tensor(3)]))]
        [1, 2, 3]
    """
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        else:
            for item in _items(leaf, objects):
                yield from tensors_in(item, objects=objects)


def _items(leaf: Any, objects: bool) -> list[Any]:
    """List the contents of a container that `torch.utils._pytree` does not know."""
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    if isinstance(leaf, list | tuple):
        return list(leaf)
    if isinstance(leaf, type):
        return []
    if dataclasses.is_dataclass(leaf):
        return [getattr(leaf, field.name) for field in dataclasses.fields(leaf)]
    return list(vars(leaf).values()) if objects and hasattr(leaf, "__dict__") else []


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``function`` to the tensors in dicts, lists, tuples and named tuples; everything else stays itself."""

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, dict):
            return {key: map_tensors(function, item) for key, item in leaf.items()}
        if isinstance(leaf, list | tuple):
            items = [map_tensors(function, item) for item in leaf]
            return type(leaf)(*items) if hasattr(leaf, "_fields") else type(leaf)(items)
        return leaf

    return tree_map(change, value)
