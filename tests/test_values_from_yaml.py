"""Every value can be written in a YAML file, as LightningCLI reads it, and comes back from ``--print_config``."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from torch import nn

from lightning_light.budgets import Budget, Channels, Latency, MACs, Params, Size, Sparsity
from lightning_light.criteria import Activation, BatchNormScale, Criterion, GeometricMedian, Hessian, Magnitude, Random

from lightning_light.criteria import Normalizer, Reduction, Taylor  # isort: skip
from lightning_light.export import ONNX
from lightning_light.schedules import (
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    OneShot,
    Schedule,
    Staircase,
    Window,
)
from lightning_light.targets import Targets, TargetsLike


class Method:
    """Takes its arguments as a callback does."""

    def __init__(
        self,
        budget: Budget,
        *,
        criterion: Criterion = Magnitude(),
        schedule: Schedule = Window(Cubic(), start=0.1, end=0.6),
        targets: TargetsLike = None,
        reduction: Reduction = "mean",
        normalizer: Normalizer | None = "mean",
    ) -> None:
        self.values = (budget, criterion, schedule, targets, reduction, normalizer)


def deep(name: str, module: nn.Module) -> bool:
    return name.count(".") > 1


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Method, "method")
    return parser


def built(arguments: list[str]) -> tuple[Any, ...]:
    parsed = parser()
    return instantiate(parsed, parsed.parse_args(arguments)).method.values


def instantiate(parsed: ArgumentParser, arguments: Any) -> Any:
    """The method's name of the installed jsonargparse: `instantiate_classes` has become `instantiate`."""
    name = "instantiate" if hasattr(parsed, "instantiate") else "instantiate_classes"
    return getattr(parsed, name)(arguments)


def from_yaml(text: str, path: Path) -> tuple[Any, ...]:
    config = path / "config.yaml"
    config.write_text(text)
    return built([f"--config={config}"])


CASES: list[tuple[str, str, Any]] = [
    ("budget", "{class_path: lightning_light.budgets.MACs, init_args: {remaining: 0.4}}", MACs(0.4)),
    ("budget", "{class_path: lightning_light.budgets.Params, init_args: {remaining: 1}}", Params(1.0)),
    ("budget", "{class_path: lightning_light.budgets.Channels, init_args: {remaining: 0.5}}", Channels(0.5)),
    ("budget", "{class_path: lightning_light.budgets.Sparsity, init_args: {amount: 0.9}}", Sparsity(0.9)),
    ("budget", "{class_path: lightning_light.budgets.Size, init_args: {limit: 2 MB}}", Size("2 MB")),
    ("budget", "{class_path: lightning_light.budgets.Size, init_args: {limit: 4096}}", Size(4096)),
    ("budget", "{class_path: lightning_light.budgets.Latency, init_args: {limit: 4 ms}}", Latency("4 ms")),
    ("budget", "{class_path: lightning_light.budgets.Latency, init_args: {limit: 0.25}}", Latency(0.25)),
    (
        "budget",
        "{class_path: lightning_light.Latency, init_args: {limit: 4 ms, threads: 2, runtime: lightning_light.ONNX}}",
        Latency("4 ms", ONNX(), threads=2),
    ),
    ("criterion", "lightning_light.criteria.Taylor", Taylor()),
    ("criterion", "lightning_light.criteria.Hessian", Hessian()),
    ("criterion", "lightning_light.criteria.Activation", Activation()),
    ("criterion", "lightning_light.criteria.BatchNormScale", BatchNormScale()),
    ("criterion", "lightning_light.criteria.GeometricMedian", GeometricMedian()),
    ("criterion", "{class_path: lightning_light.criteria.Magnitude, init_args: {p: 1.0}}", Magnitude(1.0)),
    ("criterion", "{class_path: lightning_light.criteria.Random, init_args: {seed: 7}}", Random(7)),
    ("schedule", "lightning_light.schedules.Linear", Linear()),
    ("schedule", "lightning_light.schedules.Cosine", Cosine()),
    ("schedule", "{class_path: lightning_light.schedules.Constant, init_args: {value: 0.5}}", Constant(0.5)),
    ("schedule", "{class_path: lightning_light.schedules.OneShot, init_args: {at: 0.5}}", OneShot(0.5)),
    ("schedule", "{class_path: lightning_light.schedules.Exponential, init_args: {rate: 2.0}}", Exponential(2.0)),
    (
        "schedule",
        """
    class_path: lightning_light.schedules.Window
    init_args:
      start: 1
      end: 1.0
      schedule:
        class_path: lightning_light.schedules.Staircase
        init_args: {steps: 4, schedule: lightning_light.schedules.Cubic}""",
        Window(Staircase(Cubic(), 4), start=1, end=1.0),
    ),
    ("targets", "encoder.*", "encoder.*"),
    ("targets", "[encoder.*, fc]", ["encoder.*", "fc"]),
    ("targets", "{include: [a, b], types: [Conv2d], exclude: c}", Targets(["a", "b"], "c", ["Conv2d"])),
    ("targets", f"{{predicate: {__name__}.deep}}", Targets(predicate=deep)),
    ("reduction", "first", "first"),
    ("normalizer", "null", None),
]
NAMES = ["budget", "criterion", "schedule", "targets", "reduction", "normalizer"]


@pytest.mark.parametrize(("name", "text", "expected"), CASES, ids=lambda value: str(value)[:60])
def test_from_yaml(name: str, text: str, expected: Any, tmp_path: Path) -> None:
    budget = (
        ""
        if name == "budget"
        else "  budget: {class_path: lightning_light.budgets.MACs, init_args: {remaining: 0.4}}\n"
    )
    value = from_yaml(f"method:\n{budget}  {name}: {text}\n", tmp_path)[NAMES.index(name)]
    assert value == expected
    assert type(value) is type(expected)


def test_an_epoch_and_a_fraction_stay_apart(tmp_path: Path) -> None:
    text = (
        "method:\n  budget: {class_path: lightning_light.budgets.MACs, init_args: {remaining: 0.4}}\n"
        "  schedule: {class_path: lightning_light.schedules.Window, "
        "init_args: {schedule: lightning_light.schedules.Cubic, start: START, end: END}}\n"
    )
    for start, end in [(0, 1), (0.0, 1.0), (1, 1.0), (0.0, 1)]:
        window = from_yaml(text.replace("START", str(start)).replace("END", str(end)), tmp_path)[2]
        assert (type(window.start), type(window.end)) == (type(start), type(end))


def test_from_the_command_line() -> None:
    values = built(
        [
            "--method.budget=Size",
            "--method.budget.limit=2 MB",
            "--method.criterion=Taylor",
            "--method.schedule=Constant",
            "--method.schedule.value=0.5",
            "--method.targets=fc",
        ]
    )
    assert values == (Size("2 MB"), Taylor(), Constant(0.5), "fc", "mean", "mean")


def test_defaults_come_back_from_print_config(tmp_path: Path) -> None:
    arguments = ["--method.budget=Latency", "--method.budget.limit=4 ms"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        parser().parse_args([*arguments, "--print_config"])
    assert from_yaml(printed.getvalue(), tmp_path) == built(arguments)
    assert built(arguments)[1:3] == (Magnitude(), Window(Cubic(), start=0.1, end=0.6))


def test_a_wrong_value_is_refused_with_our_sentence(tmp_path: Path) -> None:
    config = parser()
    arguments = config.parse_args(["--method.budget=MACs", "--method.budget.remaining=40"])
    with pytest.raises(ValueError, match=r"`MACs\(remaining=40.*\)`: expected 0 < remaining <= 1"):
        instantiate(config, arguments)
