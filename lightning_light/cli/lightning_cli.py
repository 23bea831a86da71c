"""`LightningLightCLI`: LightningCLI whose errors are one sentence with the nearest name."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_light.errors import LightningLightError
from lightning_light.host.cli import lightning_cli_of
from lightning_light.planning import plan

__all__ = ["LightningLightCLI", "one_sentence"]

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI
else:
    LightningCLI = object

_OURS = re.compile(r"`[^\n]*`[^\n]*: expected [^\n]*")
_CLASS = re.compile(r"Expected a dot import path string: (\S+)|has no attribute '(\w+)'|No module named '([\w.]+)'")
_OPTION = re.compile(r"[Oo]ption '([\w.]+)' is not accepted|accept option '([\w.]+)'|arguments: --?([\w.+]+)")
_OWNER = re.compile(r"given class_path '([\w.]+)':\s+Option '")
_ONE_VALUE = re.compile(r'Parser key "([\w.]+)":\s+Expected a ([^\n]*)\. Got value: ([^\n]*)')
_VALUE = re.compile(r'Parser key "([\w.]+)":\s+(?:.*?- )?(Expected a .*)', re.DOTALL)


class LightningLightCLI(LightningCLI):
    """LightningCLI with short names of the methods, errors of one sentence, and the subcommand ``plan``.

    Use it as LightningCLI, of either host. A wrong key or class gives the nearest one, a wrong value this package's
    sentence; the exit status is 2. What a run refuses is one sentence too, with exit status 1. Errors of the user's own
    code keep their traceback. ``plan`` takes the configuration of ``fit`` and prints `lightning_light.plan`.

    Example:
        >>> LightningLightCLI.__mro__[0].__name__
        'LightningLightCLI'

    Args:
        model_class: as for LightningCLI, like all other arguments.
        *args: positional arguments.
        **kwargs: keyword arguments.
    """

    def __new__(cls, model_class: Any = None, *args: Any, **kwargs: Any) -> LightningLightCLI:
        """Derive from LightningCLI of the host of ``model_class``."""
        base = lightning_cli_of(model_class)
        made = cls if issubclass(cls, base) else type(cls.__name__, (cls, base), {"__module__": cls.__module__})
        return object.__new__(made)

    def __init__(self, model_class: Any = None, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("parser_class", _readable(lightning_cli_of(model_class)))
        self._plans = False
        try:
            super().__init__(model_class, *args, **kwargs)
        except LightningLightError as error:
            sys.exit(f"error: {' '.join(str(error).split())}")

    @override
    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse ``plan`` as ``fit``."""
        given = sys.argv[1:] if args is None else args
        if isinstance(given, list) and given[:1] == ["plan"]:
            self._plans, args = True, ["fit", *given[1:]]
            if sys.argv[1:] == given:
                sys.argv = [sys.argv[0]]  # LightningCLI warns of arguments that are given twice
        super().parse_arguments(parser, args)

    @override
    def instantiate_classes(self) -> None:
        """Build the objects; of a wrong value only the sentence is shown."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            found = _OURS.search(str(error))
            if found is None:
                raise
            sys.stderr.write(f"error: {found[0]}\n")
            raise SystemExit(2) from error

    def fit(self, **kwargs: Any) -> None:
        """Run ``fit``, or print its plan."""
        if not self._plans:
            self.trainer.fit(**kwargs)
            return
        model, data = self.model, self.datamodule
        given = model if data is None else data
        found = plan(
            model,
            given,
            self.trainer.callbacks,  # type: ignore[attr-defined]  # set by a connector
            max_epochs=None if (self.trainer.max_epochs or 0) < 1 else self.trainer.max_epochs,
        )
        sys.stdout.write(f"{found}\n")


def one_sentence(parser: argparse.ArgumentParser, message: str) -> str:
    """Turn a message of jsonargparse into one sentence: this package's, or the wrong name with the nearest ones."""
    if ours := _OURS.search(message):
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
    if wrong := _ONE_VALUE.search(message):
        return f"`{wrong[1]}`: expected {_plain(wrong[2])}, found {wrong[3]}."
    if wrong := _VALUE.search(message):
        lines = [line.strip(" -") for line in wrong[2].split("\n")]
        kinds = [line.removeprefix("Expected a ").partition(". Got")[0] for line in lines if "Expected a " in line]
        got = next((line.partition(":")[2] for line in lines if "Given value:" in line or "Got value:" in line), "")
        return f"`{wrong[1]}`: expected {' or '.join(map(_plain, kinds))}, found{got}."
    return " ".join(message.split())


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
    public = {name for name in sys.modules["lightning_light"].__all__ if name[0].isupper()}
    return public | {each.__name__ for root in _roots() for each in _subclasses(root)}


def _roots() -> Iterator[type]:
    from lightning_light.budgets import Budget
    from lightning_light.criteria.evidence import Criterion
    from lightning_light.host.classes import Callback
    from lightning_light.schedules import Schedule

    yield from (Budget, Criterion, Schedule)
    yield from Callback.__mro__[:-1]


def _subclasses(root: type[Any]) -> Iterator[type[Any]]:
    for each in root.__subclasses__():
        yield each
        yield from _subclasses(each)


def _readable(cli: type) -> type:
    """Return the parser class of a host, with errors of one sentence."""
    base: Any = sys.modules[cli.__module__].LightningArgumentParser

    def error(self: Any, message: str, ex: Exception | None = None) -> None:
        if not self.exit_on_error:
            base.error(self, message, ex)
        sys.stderr.write(f"error: {one_sentence(self, message)}\n")
        self.exit(2)

    return type(base.__name__, (base,), {"error": error, "__module__": __name__})
