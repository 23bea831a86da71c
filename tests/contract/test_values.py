"""A callback can be written down: its ``repr`` makes an equal one, and so does YAML, there and back."""

import importlib
import inspect
import pkgutil
from pathlib import Path, PosixPath
from tempfile import gettempdir
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

import lightning_light
from lightning_light.callback import CompressionCallback
from lightning_light.targets import Targets
from tests.contract.table import CASES, public_callbacks


def names() -> dict[str, Any]:
    """Public names of the package and of its modules, and paths."""
    found: dict[str, Any] = {"PosixPath": PosixPath}
    for module in pkgutil.iter_modules(lightning_light.__path__):
        loaded = importlib.import_module(f"lightning_light.{module.name}")
        found |= {name: getattr(loaded, name) for name in getattr(loaded, "__all__", ())}
    return found


def as_config(value: Any) -> Any:
    """A value as one writes it in YAML."""
    if isinstance(value, dict):
        return {key: as_config(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_config(item) for item in value]
    if type(value).__module__.startswith("lightning_light"):
        kind = type(value)
        parameters = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
        arguments = {name: as_config(getattr(value, name)) for name in parameters if hasattr(value, name)}
        path = "Targets" if isinstance(value, Targets) else kind.__qualname__
        return {"class_path": f"{kind.__module__}.{path}", "init_args": arguments}
    return str(value) if isinstance(value, PosixPath) else value


def parsed(config: Any) -> tuple[str, list[Any]]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    known = parser.parse_object({"callbacks": config})
    text = parser.dump(known, skip_none=False)
    again = parser.parse_string(text)
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return text, make(again).callbacks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repr_makes_an_equal_callback(case, tmp_path) -> None:
    for callback in case.build(tmp_path):
        again = eval(repr(callback), names())
        assert type(again) is type(callback)
        assert repr(again) == repr(callback)
        assert arguments(again) == arguments(callback)


def arguments(callback: Any) -> dict[str, str]:
    parameters = [name for name in inspect.signature(type(callback).__init__).parameters if name != "self"]
    return {name: repr(getattr(callback, name)) for name in parameters if hasattr(callback, name)}


def rows_with_new_callbacks() -> list[Any]:
    """For ``parametrize``: every row, with the positions of those callbacks that no earlier row has."""
    seen, rows = set(), []
    for case in CASES:
        configs = [repr(as_config(callback)) for callback in case.build(Path(gettempdir()))]
        new = [position for position, config in enumerate(configs) if config not in seen]
        seen.update(configs)
        if new:
            rows.append(pytest.param(case, new, id=case.name))
    return rows


@pytest.mark.filterwarnings("ignore:(?s).*skip_none", "ignore:(?s).*JSONARGPARSE_DEPRECATION")  # works in old and new
@pytest.mark.parametrize(("case", "new"), rows_with_new_callbacks())
def test_yaml_there_and_back(case, new, tmp_path) -> None:
    built = [callback for position, callback in enumerate(case.build(tmp_path)) if position in new]
    _, again = parsed([as_config(callback) for callback in built])
    for callback, twin in zip(built, again, strict=True):
        assert type(twin) is type(callback)
        assert as_config(twin) == as_config(callback)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_argument_is_kept_as_given(case, tmp_path) -> None:
    for callback in case.build(tmp_path):
        assert isinstance(callback, CompressionCallback)
        for name in inspect.signature(type(callback).__init__).parameters:
            assert name == "self" or hasattr(callback, name), f"{type(callback).__name__}.{name}"


@pytest.mark.parametrize("callback", sorted(public_callbacks(), key=lambda cls: cls.__name__))
def test_defaults_are_printed_as_yaml(callback) -> None:
    """A list of objects as a default would not be: `None` stands for it."""
    for name, parameter in inspect.signature(callback.__init__).parameters.items():
        if isinstance(parameter.default, list | tuple):
            assert all(isinstance(item, bool | int | float | str) for item in parameter.default), name
