"""Targets: which layers of a model a method changes, selected by name, type or predicate."""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from torch import nn

from lightning_light.errors import TargetError
from lightning_light.validation import validated

__all__ = ["Targets", "TargetsLike", "as_targets", "inside"]


@validated
@dataclass(frozen=True)
class Targets:
    """Select the layers that a method may change; all layers of the model by default.

    A pattern is a glob over the dotted name (``"encoder.*.conv?"``), or, after ``re:``, a regular expression that
    must match the whole name. It selects the module of that name and everything inside. A module that is registered
    under several names is found by each of them and listed under the first.

    Args:
        include: one pattern or several; a module is selected if any of them matches it.
        exclude: one pattern or several; a module is left out if any of them matches it.
        types: classes, or their names, short (``"Conv2d"``) or full (``"torch.nn.Conv2d"``); subclasses match too.
            Empty: all.
        predicate: called with the name and the module of what is left, true for what is selected; in YAML its import
            path.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a regular expression cannot be compiled, or ``include`` is empty.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 2))
        >>> list(Targets(exclude="2", types=("Conv2d", "Linear")).select(model))
        ['0']
    """

    include: str | list[str] | tuple[str, ...] = ("*",)
    exclude: str | list[str] | tuple[str, ...] = ()
    types: str | type[nn.Module] | list[str | type[nn.Module]] | tuple[str | type[nn.Module], ...] = ()
    predicate: Callable[[str, nn.Module], bool] | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "types"):
            value = tuple(_as_name(item) for item in _as_tuple(getattr(self, name)))
            object.__setattr__(self, name, value)  # a list, as YAML gives it, has no hash; a class no YAML
        if not self.include:
            raise ValueError(
                f"`{self!r}`: expected at least one pattern in `include`, found none. For every layer leave it out."
            )
        for pattern in (*self.include, *self.exclude):
            _compiled(pattern)

    def select(self, model: nn.Module, *, root: bool = False) -> dict[str, nn.Module]:
        """Return the selected modules by name, in the model's order; the model itself only if it has no children.

        Args:
            model: any module.
            root: return the model itself as well, under an empty name, unless the patterns name only parts of it.

        Raises:
            TargetError: nothing is selected, or one of the patterns matches nothing.
        """
        names = ({model: [""]} if root else {}) | _names(model)
        known = [name for aliases in names.values() for name in aliases]
        included = self._named(self.include, "include", known)
        excluded = self._named(self.exclude, "exclude", known)
        chosen = {
            aliases[0]: module
            for module, aliases in names.items()
            if not included.isdisjoint(aliases) and excluded.isdisjoint(aliases) and self._admits(aliases[0], module)
        }
        if not chosen:
            kinds = sorted({type(module).__name__ for module in names})
            raise TargetError(
                f"`{self!r}` on `{type(model).__name__}`: expected at least one layer, found none "
                f"(the patterns name {len(included - excluded)} of {len(known)} modules; types in the model: "
                f"{', '.join(kinds)}). Widen `include` or `types`, or narrow `exclude`."
            )
        return chosen

    def _named(self, patterns: Iterable[str], argument: str, known: list[str]) -> set[str]:
        named: set[str] = set()
        for pattern in patterns:
            found = {name for name in known if _matches(pattern, name)}
            if not found:
                raise TargetError(_nothing_named(argument, pattern, known))
            named |= found
        return named

    def _admits(self, name: str, module: nn.Module) -> bool:
        types: tuple[str, ...] = self.types  # type: ignore[assignment]  # `__post_init__` has made them so
        if types and not any(_is_a(module, kind) for kind in types):
            return False
        return self.predicate is None or self.predicate(name, module)


TargetsLike: TypeAlias = Targets | str | type[nn.Module] | Sequence[str | type[nn.Module]] | None
"""What `as_targets` accepts, for the annotation of an argument."""


@validated
def as_targets(value: TargetsLike) -> Targets:
    """Make `Targets` of what a user may give instead: nothing, patterns, or layer classes.

    Raises:
        TypeError: ``value`` is none of them, or patterns and classes are mixed in one list.

    Example:
        >>> as_targets("encoder.*")
        Targets(include=('encoder.*',), exclude=(), types=(), predicate=None)
        >>> list(as_targets(nn.Linear).select(model))
        ['4']
    """
    if value is None:
        return Targets()
    if isinstance(value, Targets):
        return value
    items = _as_tuple(value)
    names = tuple(item for item in items if isinstance(item, str))
    types = tuple(item for item in items if not isinstance(item, str))
    if names and types:
        raise TypeError(
            f"`targets={list(items)!r}`: expected patterns or layer classes, found both. For the layers of a class "
            "under a name write `Targets(include=..., types=...)`."
        )
    return Targets(types=types) if types else Targets(include=names)


@validated
def inside(name: str, parts: Iterable[str]) -> bool:
    """Check whether the module or tensor ``name`` is one of ``parts`` or lies inside one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of every module, in order; without the model itself, unless it has no children."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names.setdefault(module, []).append(name)
    return names or {model: [""]}


def _matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches ``name`` or a module that contains it."""
    compiled = _compiled(pattern)
    parts = name.split(".")
    return any(compiled.fullmatch(".".join(parts[:depth])) for depth in range(len(parts), 0, -1))


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ValueError(
            f"`Targets({pattern!r})`: expected a regular expression after `re:`, found one that does not compile "
            f"({error}). A glob needs no `re:`: `Targets('encoder.*')`."
        ) from error


def _is_a(module: nn.Module, kind: str) -> bool:
    """Whether the class of ``module``, or one it inherits from, is called ``kind``."""
    return any(
        kind in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}") or _is_alias(cls, kind)
        for cls in type(module).__mro__
    )


def _is_alias(cls: type, path: str) -> bool:
    """Whether ``path`` is another way to import ``cls``: ``torch.nn.Conv2d``, of ``torch.nn.modules.conv``."""
    folder, _, name = path.rpartition(".")
    return bool(folder) and getattr(sys.modules.get(folder), name, None) is cls


def _nothing_named(argument: str, pattern: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(pattern.removeprefix("re:"), known, n=5, cutoff=0.4) or known[:5]
    return (
        f"`Targets({argument}={pattern!r})`: expected a pattern that matches a module, found none among {len(known)}. "
        f"Nearest: {', '.join(repr(name) for name in nearest)}. A `*` crosses dots; print the names with "
        "`[name for name, _ in model.named_modules()]`."
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str | type) else tuple(value)


def _as_name(item: str | type) -> str:
    return f"{item.__module__}.{item.__qualname__}" if isinstance(item, type) else item
