"""Search spaces: a function of a trial, or callbacks in LightningCLI's notation with ranges in place of values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["Space", "draw", "read_space"]

Space: TypeAlias = Callable[[Any], Sequence[Any]] | Sequence[Mapping[str, Any]] | str | os.PathLike[str]
"""A function of a trial that returns callbacks; or a list in LightningCLI's notation, or a YAML file that holds one."""

_NUMBERS = {"low", "high", "step", "log"}
_EXPECTED = "expected a list of callbacks with `class_path` and `init_args` and at least one range in place of a value"


def read_space(space: Any) -> list[Any]:
    """Return a declarative space as plain lists, dicts and values, checked.

    Args:
        space: a list of mappings with ``class_path`` and ``init_args``, or the path of a YAML file with such a list,
            alone or below ``callbacks``. A range is ``{low: 0.3, high: 0.8}``, with ``log: true`` or a ``step`` if
            wanted, of integers if both ends are; or ``{choices: [...]}``, of values, or of objects that may have ranges
            themselves.

    Raises:
        ValueError: there is no list, no range, or a range is not one.
    """
    tree = space
    if isinstance(space, str | os.PathLike):
        import yaml

        tree = yaml.safe_load(Path(space).read_text())
    tree = tree["callbacks"] if isinstance(tree, Mapping) and "callbacks" in tree else tree
    if not isinstance(tree, Sequence) or isinstance(tree, str) or not _count_ranges(tree):
        found = "no list" if not isinstance(tree, Sequence) or isinstance(tree, str) else "no range"
        raise ValueError(
            f"`tune(space=...)`: {_EXPECTED}, found {found}. A range: `remaining: {{low: 0.3, high: 0.8}}`."
        )
    return list(tree)


def draw(tree: Sequence[Any], trial: Any) -> list[Any]:
    """Replace every range in ``tree`` by the value that ``trial`` suggests; callbacks drawn as None are left out.

    Example:
        >>> class Lowest:
        ...     def suggest_float(self, name, low, high, **_):
        ...         print(name)
        ...         return low
        >>> macs = {"class_path": "MACs", "init_args": {"remaining": {"low": 0.3, "high": 0.8}}}
        >>> draw([{"class_path": "StructuredPruning", "init_args": {"budget": macs}}], Lowest())[0]["init_args"]
        StructuredPruning.budget.remaining
        {'budget': {'class_path': 'MACs', 'init_args': {'remaining': 0.3}}}
    """
    names = [_label(item) for item in tree]
    numbered = [
        name if names.count(name) == 1 else f"{name}#{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]
    drawn = [_drawn(item, name, trial) for item, name in zip(tree, numbered, strict=True)]
    return [item for item in drawn if item is not None]


def _drawn(node: Any, name: str, trial: Any) -> Any:
    if _is_choice(node):
        options = {_option(choice, node["choices"]): choice for choice in node["choices"]}
        return _drawn(options[trial.suggest_categorical(name, list(options))], name, trial)
    if _is_number(node):
        return _suggested(node, name, trial)
    if isinstance(node, Mapping):
        prefix = {"init_args": name, "class_path": name}
        return {key: _drawn(value, prefix.get(key, f"{name}.{key}"), trial) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_drawn(item, f"{name}.{place}", trial) for place, item in enumerate(node)]
    return node


def _suggested(node: Mapping[str, Any], name: str, trial: Any) -> Any:
    options = {key: node[key] for key in ("step", "log") if key in node}
    integers = all(isinstance(node[key], int) for key in node.keys() - {"log"})
    suggest = trial.suggest_int if integers else trial.suggest_float
    return suggest(name, node["low"], node["high"], **options)


def _count_ranges(node: Any) -> int:
    """Count the ranges in a tree, and refuse those that are malformed."""
    if _is_choice(node):
        if not isinstance(node["choices"], Sequence) or len(node["choices"]) < 2:
            raise ValueError(f"`tune(space=...)`: expected two choices or more in a list, found {node!r}.")
        return 1 + sum(map(_count_ranges, node["choices"]))
    if _is_number(node):
        ends = [node["low"], node["high"], node.get("step", 1)]
        plain = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
        if not plain or not node["low"] < node["high"] or ends[2] <= 0 or (node.get("log") and node["low"] <= 0):
            raise ValueError(
                f"`tune(space=...)`: expected numbers with low < high, a step > 0, and low > 0 for `log: true`, found "
                f"{dict(node)!r}. In YAML write `1.0e-4`, since `1e-4` is read as text."
            )
        return 1
    if isinstance(node, Mapping):
        return sum(map(_count_ranges, node.values()))
    return sum(map(_count_ranges, node)) if isinstance(node, list | tuple) else 0


def _is_choice(node: Any) -> bool:
    return isinstance(node, Mapping) and node.keys() == {"choices"}


def _is_number(node: Any) -> bool:
    return isinstance(node, Mapping) and {"low", "high"} <= node.keys() <= _NUMBERS


def _label(node: Any) -> str:
    """The short class name of a node, or of the first of its choices that has one."""
    if _is_choice(node):
        return next((_label(choice) for choice in node["choices"] if isinstance(choice, Mapping)), "callback")
    path = node.get("class_path") if isinstance(node, Mapping) else node
    return path.rpartition(".")[2] if isinstance(path, str) else json.dumps(node, sort_keys=True)


def _option(choice: Any, choices: Sequence[Any]) -> Any:
    """How a choice is stored: a plain value as it is, an object by its class name, or in full where that is shared."""
    if choice is None or isinstance(choice, bool | int | float | str):
        return choice
    labels = [_label(one) for one in choices]
    return _label(choice) if labels.count(_label(choice)) == 1 else json.dumps(choice, sort_keys=True)
