"""Turn the messages of jsonargparse into one sentence, with the nearest name."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["OURS", "one_sentence", "with_sentences"]

OURS = re.compile(r"`[^\n]*`[^\n]*: expected [^\n]*")
_CLASS = re.compile(r"Expected a dot import path string: (\S+)|has no attribute '(\w+)'|No module named '([\w.]+)'")
_OPTION = re.compile(r"[Oo]ption '([\w.]+)' is not accepted|accept option '([\w.]+)'|arguments: --?([\w.+]+)")
_OWNER = re.compile(r"given class_path '([\w.]+)':\s+Option '")
_KIND = re.compile(r'Parser key "([\w.]+)":\s+Not of type (\w+): (?:(\S+) does not|.*(\'.*\'))')
_MISSING = re.compile(r"the following arguments are required: (.*)")
_ONE_VALUE = re.compile(r'Parser key "([\w.]+)"(?: element \d+)?:\s+Expected a ([^\n]*)\. Got value: ([^\n]*)')
_VALUE = re.compile(r'Parser key "([\w.]+)":\s+(?:.*?- )?(Expected a .*)', re.DOTALL)


def with_sentences(base: Any) -> type[Any]:
    """Derive from a parser class of jsonargparse one whose errors are one sentence."""

    def error(self: Any, message: str, ex: Exception | None = None) -> None:
        if not self.exit_on_error:
            base.error(self, message, ex)
        sys.stderr.write(f"error: {one_sentence(self, message)}\n")
        self.exit(2)

    return type(base.__name__, (base,), {"error": error, "__module__": __name__})


def one_sentence(parser: argparse.ArgumentParser, message: str) -> str:
    """Turn a message of jsonargparse into one sentence: this package's, or the wrong name with the nearest ones."""
    if ours := OURS.search(message):
        return ours[0]
    if wrong := _OPTION.search(message):
        name = next(filter(None, wrong.groups())).partition(".init_args")[0].partition("+")[0]
        owner = _OWNER.search(message)
        known = _options(parser) if owner is None else _arguments(owner[1])
        name = name if owner is None else name.partition(".")[0]
        of = "" if owner is None else f" of `{owner[1].rpartition('.')[2]}`"
        return f"`{name}`: expected an argument{of}, found none of this name.{_nearest(name, known)}"
    if wrong := _CLASS.search(message):
        name = next(filter(None, wrong.groups())).rpartition(".")[2]
        return f"`{name}`: expected a class, found none of this name.{_nearest(name, _classes())}"
    if wrong := _MISSING.search(message):
        return f"`{wrong[1]}`: expected values, found none."
    if wrong := _KIND.search(message):
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", wrong[2]).lower()  # PositiveInt
        return f"`{wrong[1]}`: expected a {kind}, found {wrong[3] or wrong[4]}."
    if wrong := _ONE_VALUE.search(message):
        return f"`{wrong[1]}`: expected {_plain(wrong[2])}, found {wrong[3]}."
    if wrong := _VALUE.search(message):
        lines = [line.strip(" -") for line in wrong[2].split("\n")]
        kinds = [line.removeprefix("Expected a ").partition(". Got")[0] for line in lines if "Expected a " in line]
        got = next((line.partition(":")[2] for line in lines if "Given value:" in line or "Got value:" in line), "")
        return f"`{wrong[1]}`: expected {' or '.join(map(_plain, kinds))}, found{got}."
    return f"{' '.join(message.split()).rstrip('.')}. See `{parser.prog.replace('[options] ', '')} --help`."


def _plain(kind: str) -> str:
    return re.sub(r"<class '(.*)'>|typing\.", lambda match: match[1] or "", kind).replace("NoneType", "null")


def _nearest(name: str, known: set[str]) -> str:
    """Return the nearest names, of the last part where the first ones are right."""
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f" The nearest: {', '.join(f'`{each}`' for each in near)}." if near else ""


def _options(parser: argparse.ArgumentParser) -> set[str]:
    found = {action.dest for action in parser._actions}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name for each in action.choices.values() for name in _options(each)}
    return found


def _arguments(path: str) -> set[str]:
    module, _, name = path.rpartition(".")
    return set(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def _classes() -> set[str]:
    """Name the classes of this package and all callbacks that are loaded."""
    from lightning_light.encoding import subclasses

    public = {name for name in sys.modules["lightning_light"].__all__ if name[0].isupper()}
    return public | {each.__name__ for root in _roots() for each in subclasses(root)}


def _roots() -> Iterator[type[object]]:
    from lightning_light.budgets import Budget
    from lightning_light.criteria.evidence import Criterion
    from lightning_light.host.classes import Callback
    from lightning_light.schedules import Schedule

    yield from (Budget, Criterion, Schedule)
    yield from Callback.__mro__[:-1]
