"""Targets: which layers a method may touch, by name, by type, or by a question asked of each."""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from lightning_light.errors import TargetError

__all__ = ["Targets", "as_targets"]


@dataclass(frozen=True)
class Targets:
    """Names the layers that a method may touch; everything of the model by default.

    A pattern is a glob over the dotted name (``"encoder.*.conv?"``), or, after ``re:``, a regular expression that
    must match the whole name. It stands for the module it names and for everything inside. A module that is
    registered under several names answers to each of them and is listed under the first.

    Args:
        include: one pattern or several; a module is in if any of them names it.
        exclude: one pattern or several; a module is out if any of them names it.
        types: class names, short (``"Conv2d"``) or full (``"torch.nn.Conv2d"``); subclasses count. Empty: all.
        predicate: asked last, with the name and the module; in YAML its import path.

    Raises:
        ValueError: a regular expression cannot be compiled, or ``include`` is empty.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 2))
        >>> list(Targets(exclude="2", types=("Conv2d", "Linear")).select(model))
        ['0']
    """

    include: str | list[str] | tuple[str, ...] = ("*",)
    exclude: str | list[str] | tuple[str, ...] = ()
    types: str | list[str] | tuple[str, ...] = ()
    predicate: Callable[[str, nn.Module], bool] | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "types"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))  # a list, as YAML gives it, has no hash
        if not self.include:
            raise ValueError(
                f"`{self!r}`: expected at least one pattern in `include`, found none. For every layer leave it out."
            )
        for pattern in (*self.include, *self.exclude):
            _compiled(pattern)

    def select(self, model: nn.Module) -> dict[str, nn.Module]:
        """The chosen modules by name, in the model's own order; the model itself only if it has no children.

        Raises:
            TargetError: nothing is chosen, or a pattern alone names nothing.
        """
        names = _names(model)
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
        if self.types and not any(_is_a(module, kind) for kind in self.types):
            return False
        return self.predicate is None or self.predicate(name, module)


def as_targets(value: Targets | str | Sequence[str] | None) -> Targets:
    """`Targets` from what a user may write in their place: nothing, one pattern, several, or `Targets`.

    Example:
        >>> as_targets("encoder.*")
        Targets(include=('encoder.*',), exclude=(), types=(), predicate=None)
    """
    if value is None:
        return Targets()
    return value if isinstance(value, Targets) else Targets(include=_as_tuple(value))


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of every module, in order; without the model itself, unless it is all there is."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names.setdefault(module, []).append(name)
    return names or {model: [""]}


def _matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names ``name`` or a module that holds it."""
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
    """Whether ``path`` is another way to import ``cls``: ``torch.nn.Conv2d`` lives in ``torch.nn.modules.conv``."""
    folder, _, name = path.rpartition(".")
    return bool(folder) and getattr(sys.modules.get(folder), name, None) is cls


def _nothing_named(argument: str, pattern: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(pattern.removeprefix("re:"), known, n=5, cutoff=0.4) or known[:5]
    return (
        f"`Targets({argument}={pattern!r})`: expected the name of a module, found none among {len(known)}. "
        f"Nearest: {', '.join(repr(name) for name in nearest)}. A `*` crosses dots; print the names with "
        "`[name for name, _ in model.named_modules()]`."
    )


def _as_tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
