"""Patch one attribute of a user's instance, list the patches, and undo them in any order."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, ClassVar

__all__ = ["InstancePatch", "RunHook", "patches_of", "wrap_method"]

_PATCHES = "_lightning_light_patches"


class _Missing:
    """Marks an attribute that the instance itself did not have: its class may."""


class _Patches(list["InstancePatch"]):
    """The active patches of one instance, oldest first. A copy of the instance copies them; a pickle has none."""

    def __reduce__(self) -> Any:
        return _Patches, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Patches:
        copied = memo[id(self)] = _Patches()
        copied.extend(copy.deepcopy(patch, memo) for patch in self)
        return copied


class InstancePatch:
    """Replace one attribute of an instance, until `undo`.

    Several patches of one attribute form a stack and can be undone in any order. If other code has replaced the
    attribute since, its value stays; a method that `wrap_method` has wrapped then passes its calls through.

    Attributes:
        owner: the instance.
        name: of the attribute.
        value: its new value.
        original: the value that it replaces, from the instance or its class.
        active: False from `undo` on.

    Example:
        >>> module = nn.Identity()
        >>> patch = InstancePatch(module, "forward", lambda x: x + 1)
        >>> module(1), [found.name for found in patches_of(module)]
        (2, ['forward'])
        >>> patch.undo()
        >>> module(1), patches_of(module)
        (1, [])

    Args:
        owner: the instance.
        name: of the attribute.
        value: its new value.
        beneath: insert below the patches that the attribute has, as if this one had been made before them.
    """

    def __init__(self, owner: Any, name: str, value: Any, *, beneath: bool = False) -> None:
        self.owner, self.name, self.value, self.active = owner, name, value, True
        patches: _Patches = vars(owner).setdefault(_PATCHES, _Patches())
        above = next((patch for patch in patches if patch.name == name), None) if beneath else None
        if above is None:
            self._replaced = vars(owner).get(name, _Missing)
            self.original: Any = getattr(owner, name, None)
            vars(owner)[name] = value
            patches.append(self)
        else:
            self._replaced, self.original = above._replaced, above.original
            above._replaced = above.original = value
            patches.insert(patches.index(above), self)

    def undo(self) -> None:
        """Put back what was there before. More than once does no harm."""
        self.active = False
        patches: _Patches = vars(self.owner).get(_PATCHES, _Patches())
        if self not in patches:
            return
        own = [patch for patch in patches if patch.name == self.name]
        above = next(iter(own[own.index(self) + 1 :]), None)
        if above is not None and above._replaced is self.value:
            above._replaced, above.original = self._replaced, self.original
        elif vars(self.owner).get(self.name, _Missing) is self.value:
            self._restore()
        else:
            return  # other code holds our value: it stays in the list, inactive
        patches.remove(self)
        if not patches:
            vars(self.owner).pop(_PATCHES)
        for patch in [patch for patch in own if patch is not self and not patch.active]:
            patch.undo()

    def _restore(self) -> None:
        if self._replaced is _Missing:
            vars(self.owner).pop(self.name)
        else:
            vars(self.owner)[self.name] = self._replaced


def wrap_method(owner: Any, name: str, around: Callable[..., Any]) -> InstancePatch:
    """Wrap a method of one instance; a copy of the instance has the method itself, bound to the copy.

    Args:
        owner: the instance.
        name: of the method.
        around: called with the method and its arguments; returns what the caller gets.
    """
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is owner:
            return around(patch.original, *args, **kwargs) if patch.active else patch.original(*args, **kwargs)
        copied = next(one for one in patches_of(self) if getattr(one.value, "__func__", None) is wrapper)
        return copied.original(*args, **kwargs)

    signature = inspect.signature(method)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    wrapper.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]
    patch = InstancePatch(owner, name, MethodType(wrapper, owner))
    return patch


class RunHook:
    """A hook of a run on a module of the user; copies and pickles of the module have one that does nothing.

    Args:
        function: what the hook calls.
    """

    _pauses: ClassVar[int] = 0

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return None if self._function is None or RunHook._pauses else self._function(*args, **kwargs)

    def __reduce__(self) -> Any:
        return RunHook, ()

    @classmethod
    @contextmanager
    def paused(cls) -> Iterator[None]:
        """Let no hook of a run call its function inside, for a call of a module that is not the user's."""
        RunHook._pauses += 1
        try:
            yield
        finally:
            RunHook._pauses -= 1


def patches_of(owner: Any) -> list[InstancePatch]:
    """List the patches of an instance, oldest first; inactive ones are held by other code that wraps them."""
    return list(vars(owner).get(_PATCHES, ()))
