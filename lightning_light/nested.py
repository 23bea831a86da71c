"""Read and change the tensors in nested containers."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_map

__all__ = ["are_sizes", "map_tensors", "named_leaves", "tensors_in"]

_OPAQUE = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)


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
        elif (items := _items(leaf, objects)) is not None:
            for path, item in items:
                yield from (found for _, found in _leaves(item, path, objects, {id(leaf)}) if isinstance(found, Tensor))


def are_sizes(values: Iterable[Any]) -> bool:
    """Check whether all tensors among ``values`` are single integers: sizes are such tensors in `torch.jit.trace`.

    Example:
        >>> are_sizes([torch.tensor(3), 4]), are_sizes([3, 4]), are_sizes([torch.tensor(3), torch.ones(2)])
        (True, False, False)
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    return bool(tensors) and all(tensor.dim() == 0 and not tensor.is_floating_point() for tensor in tensors)


def named_leaves(value: Any, *, objects: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield what is in a container and is none itself, with its path, in the order of `tensors_in`.

    Args:
        value: as in `tensors_in`.
        objects: as in `tensors_in`.

    Example:
        >>> list(named_leaves({"a": [1, None], "b": 2}))
        [("['a'][0]", 1), ("['a'][1]", None), ("['b']", 2)]
    """
    yield from _leaves(value, "", objects, set())


def _leaves(value: Any, path: str, objects: bool, above: set[int]) -> Iterator[tuple[str, Any]]:
    items = None if isinstance(value, Tensor) else _items(value, objects)
    if items is None:
        yield path, value
    elif id(value) not in above:  # an object that refers to what holds it
        for key, item in items:
            yield from _leaves(item, path + key, objects, above | {id(value)})


def _items(value: Any, objects: bool) -> list[tuple[str, Any]] | None:
    """List the contents of a container, by their paths in it; None for what is no container."""
    try:
        found = tree_flatten_with_path(value, is_leaf=lambda item: item is not value)[0]
        items = [(keystr(path), item) for path, item in found]
    except ValueError:  # registered with `torch.utils._pytree` without keys
        flat = tree_flatten(value, is_leaf=lambda item: item is not value)[0]
        items = [(f"[{place}]", item) for place, item in enumerate(flat)]
    if [path for path, _ in items] != [""]:
        return items
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{place}]", item) for place, item in enumerate(value)]
    if isinstance(value, _OPAQUE):
        return None
    if dataclasses.is_dataclass(value):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    if objects and hasattr(value, "__dict__"):
        return [(f".{name}", item) for name, item in vars(value).items()]
    return None


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to the tensors in containers, in the order of `tensors_in`; everything else stays itself.

    An object that holds tensors in its attributes, a dataclass for instance, is copied with the new ones; one that
    cannot be copied stays itself.
    """

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        changed = {id(tensor): function(tensor) for tensor in tensors_in(leaf, objects=True)}
        try:
            return copy.deepcopy(leaf, changed) if changed else leaf
        except (TypeError, RuntimeError):  # it has a lock, a file, a connection
            return leaf

    return tree_map(change, value)
