"""Declarative spaces: ranges in place of values."""

from pathlib import Path
from typing import Any

import pytest

from lightning_light.tuning.space import draw, read_space


class Script:
    """A trial that suggests what it is given by name, and records the ranges."""

    def __init__(self, **values: Any) -> None:
        self.values, self.ranges = values, {}

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> Any:
        self.ranges[name] = (low, high, options)
        return self.values.get(name, low)

    suggest_int = suggest_float

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        self.ranges[name] = choices
        return self.values.get(name, choices[0])


TEXT = """
callbacks:
  - class_path: StructuredPruning
    init_args:
      budget: {class_path: MACs, init_args: {remaining: {low: 0.3, high: 0.8, step: 0.1}}}
      criterion: {choices: [Magnitude, {class_path: LearnedGates, init_args: {steps: {low: 5, high: 50, log: true}}}]}
  - choices: [null, {class_path: QuantizationAwareTraining, init_args: {recipe: Int8}}]
"""


def test_a_space_from_yaml_draws_what_lightning_cli_reads(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(TEXT)
    tree = read_space(tmp_path / "space.yaml")
    trial = Script(**{"StructuredPruning.criterion": "LearnedGates"})
    (pruning,) = draw(tree, trial)
    assert trial.ranges == {
        "StructuredPruning.budget.remaining": (0.3, 0.8, {"step": 0.1}),
        "StructuredPruning.criterion": ["Magnitude", "LearnedGates"],
        "StructuredPruning.criterion.steps": (5, 50, {"log": True}),
        "QuantizationAwareTraining": [None, "QuantizationAwareTraining"],
    }
    assert pruning["init_args"]["criterion"] == {"class_path": "LearnedGates", "init_args": {"steps": 5}}
    both = draw(tree, Script(QuantizationAwareTraining="QuantizationAwareTraining"))
    assert [item["class_path"] for item in both] == ["StructuredPruning", "QuantizationAwareTraining"]
    assert both[0]["init_args"]["criterion"] == "Magnitude"


def test_two_callbacks_and_two_choices_of_a_class_have_names_of_their_own() -> None:
    losses = [{"class_path": "SoftTargets", "init_args": {"temperature": heat}} for heat in (1.0, 4.0)]
    tree = [{"class_path": "KD", "init_args": {"loss": {"choices": losses}}}] * 2
    trial = Script()
    assert draw(tree, trial)[1]["init_args"]["loss"] == losses[0]
    assert list(trial.ranges) == ["KD#1.loss", "KD#2.loss"]
    assert len(set(trial.ranges["KD#1.loss"])) == 2


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ("- class_path: Int8", "found no range"),
        ("3", "found no list"),
        ("- {a: {low: 1e-4, high: 1e-2}}", "write `1.0e-4`"),
        ("- {a: {low: 2, high: 1}}", "low < high"),
        ("- {a: {low: 0.0, high: 1.0, log: true}}", "low > 0"),
        ("- {a: {choices: [1]}}", "two choices or more"),
    ],
)
def test_what_is_no_space_is_one_sentence(space: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space)
    with pytest.raises(ValueError, match=rf"`tune\(space=\.\.\.\)`: expected .*{sentence}"):
        read_space(path)
