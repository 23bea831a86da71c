"""`tune` on real trainings: isolated, repeatable, resumable, refused early."""

import functools
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_light as ll
from lightning_light.schedules import OneShot
from lightning_light.tuning import TuningResult
from tests.tuning.helpers import QUICK, SPACE, Shuffled, numbers, pruning, seeded

optuna = pytest.importorskip("optuna")

CLI = """
import warnings
import lightning as L
from lightning.pytorch.cli import LightningCLI
import lightning_light
from tests.tuning.helpers import Shuffled, Small
LightningCLI(Small, Shuffled)
"""


@pytest.fixture(autouse=True)
def quiet_optuna() -> Any:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def one_trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a study with one trial."""
    path: Path = tmp_path_factory.mktemp("study") / "study.db"
    tuned(trials=1, storage=path)
    return path


def tuned(space: Any = SPACE, trials: int = 3, **options: Any) -> TuningResult:
    options = {"objectives": {"val_loss": "min"}, "trainer": QUICK, **options}
    return ll.tune(options.pop("module", None) or seeded(), Shuffled(), space, trials=trials, **options)


def test_trials_are_repeatable_and_leave_module_and_generators_alone() -> None:
    module = seeded()
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    first, second = (tuned(module=module, objectives={"val_loss": "min", "macs": "min"}) for _ in range(2))
    assert numbers(first.study) == numbers(second.study)
    assert len({values for values, _ in numbers(first.study)}) == 3
    assert {found[1] for _, found in numbers(first.study)} == {192.0 * 8 + 8 * 5}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert module._trainer is None
    assert not ll.surgery.attachment.has_state(module)


def test_a_study_that_is_continued_equals_one_that_ran_through(tmp_path: Path) -> None:
    options = {"sampler": functools.partial(optuna.samplers.TPESampler, n_startup_trials=2)}
    through = tuned(trials=4, **options)
    tuned(trials=3, storage=tmp_path / "new" / "study.db", **options)
    again = tuned(trials=4, storage=tmp_path / "new" / "study.db", **options)
    assert numbers(again.study) == numbers(through.study)
    assert len(again.study.trials) == 4


@pytest.mark.slow
def test_lightning_cli_repeats_the_best_trial_to_the_last_bit(tmp_path: Path) -> None:
    result = tuned(trials=2)
    config = result.write_config(tmp_path / "best.yaml")
    assert f"# Trial {result.best.number} of the study 'tune'" in config.read_text()
    log = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"
    command = [sys.executable, "-W", "ignore", "-c", CLI, "fit", f"--config={config}", log]
    save = ["--trainer.logger.save_dir=csv", "--trainer.log_every_n_steps=1"]
    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": root, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PATH": ""}
    done = subprocess.run([*command, *save], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = next(tmp_path.glob("csv/**/metrics.csv")).read_text().splitlines()
    losses = [dict(zip(lines[0].split(","), line.split(","), strict=True))["val_loss"] for line in lines[1:]]
    last = [float(loss) for loss in losses if loss][-1]
    assert last == result.best.value
    assert result.best.value != result.study.trials[1 - result.best.number].value


def test_a_pruner_ends_trials_after_a_validation() -> None:
    pruner = optuna.pruners.ThresholdPruner(upper=1e-6, n_warmup_steps=1)
    result = tuned(trials=2, pruner=pruner, trainer={**QUICK, "max_epochs": 4})
    assert [trial.state.name for trial in result.study.trials] == ["PRUNED", "PRUNED"]
    assert [list(trial.intermediate_values) for trial in result.study.trials] == [[0, 1], [0, 1]]
    with pytest.raises(ll.LightningLightError, match=r"expected a completed trial, found none of 2\. Prune fewer"):
        _ = result.best
    assert "2 trials pruned" in str(result)


def test_what_a_method_refuses_fails_one_trial_and_other_errors_are_drawn_again(tmp_path: Path) -> None:
    broken = [True]

    def space(trial: Any) -> list[L.Callback]:
        amount = trial.suggest_float("amount", 0.1, 0.9)
        exclude = "nowhere" if 0 < trial.number < 2 else ()
        if trial.number == 3 and broken[0]:
            raise KeyError("a mistake of the user")
        return [ll.WeightPruning(ll.Sparsity(amount), targets=ll.Targets(exclude=exclude))]

    with pytest.raises(KeyError, match="a mistake"):
        tuned(space, trials=4, storage=tmp_path / "study.db")
    broken[0] = False
    result = tuned(space, trials=4, storage=tmp_path / "study.db")
    states = [trial.state.name for trial in result.study.trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert "1 trial refused by a method" in result._repr_html_()
    assert "nowhere" in result.study.trials[1].user_attrs["error"]


def test_the_pareto_front_is_marked_and_drawn() -> None:
    def space(trial: Any) -> list[L.Callback]:
        width = trial.suggest_categorical("remaining", [0.25, 0.5, 0.75])
        return [ll.StructuredPruning(ll.MACs(width), schedule=OneShot(at=0.25))]

    calls = []
    objectives = {"val_loss": "min", "macs": "min", "zeros": "max"}
    result = tuned(
        space,
        trials=3,
        objectives=objectives,
        measure=lambda module: calls.append(module) or {"zeros": 1.0},
        sampler=lambda seed: optuna.samplers.BruteForceSampler(seed=seed),
    )
    macs = {trial.params["remaining"]: trial.values[1] for trial in result.study.trials}
    assert all(found <= remaining * (192 * 8 + 8 * 5) for remaining, found in macs.items())
    assert all(isinstance(module, nn.Module) for module in calls)
    losses = [trial.values[0] for trial in result.front]
    assert losses == sorted(losses)
    table = result.table()
    assert [line[0].endswith("*") for line in table.lines] == [place < len(result.front) for place in range(3)]
    (axes,) = result.figure(x="macs").axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("macs", "val_loss")
    assert sorted(axes.collections[0].get_offsets()[:, 0]) == sorted(macs.values())
    assert axes.collections[1].get_offsets().tolist() == [[result.best.values[1], result.best.values[0]]]
    assert "<svg" in result._repr_html_()


def test_a_teacher_in_memory_is_tuned_but_not_written() -> None:
    teacher = seeded(1)

    def space(trial: Any) -> list[L.Callback]:
        heat = trial.suggest_float("temperature", 1.0, 8.0)
        return [ll.KnowledgeDistillation(teacher, losses=[ll.SoftTargets(temperature=heat)])]

    with pytest.warns(UserWarning, match="`Small`: expected what can be written as YAML.*`write_config` cannot"):
        result = tuned(space, trials=1)
    with pytest.raises(ValueError, match="expected the number of a trial, found none"):
        result.write_config("never.yaml")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seed": 1}, "`seed`"),
        ({"objectives": {"val_loss": "max"}}, "`objectives`"),
        ({"trainer": {**QUICK, "max_epochs": 1}}, "`trainer`"),
        ({"module": seeded(1)}, "`weights`"),
        ({"space": [*SPACE, {"class_path": "DeviceStatsMonitor"}]}, "`space`"),
        ({"space": pruning}, "`space`"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_another_study_is_refused(change: dict[str, Any], names: str, one_trial: Path) -> None:
    with pytest.raises(ll.LightningLightError, match=f"expected a study of the same space.* found another: {names}"):
        tuned(trials=2, storage=one_trial, **change)


def test_another_range_of_a_function_is_refused(tmp_path: Path) -> None:
    tuned(pruning, trials=1, storage=tmp_path / "study.db")

    def wider(trial: Any) -> list[L.Callback]:
        return [ll.WeightPruning(ll.Sparsity(trial.suggest_float("amount", 0.1, 0.95)))]

    with pytest.raises(ll.LightningLightError, match="found another: the range of `amount`"):
        tuned(wider, trials=2, storage=tmp_path / "study.db")


@pytest.mark.slow
def test_two_processes_lose_and_repeat_nothing_when_one_is_killed(tmp_path: Path) -> None:
    through = numbers(tuned(pruning, trials=8).study)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.tuning.worker", "study.db"]
    with ExitStack() as stack:

        def start(*arguments: str) -> subprocess.Popen[str]:
            options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            worker = stack.enter_context(
                subprocess.Popen([*command, *arguments], cwd=tmp_path, env=environment, **options)
            )
            stack.callback(worker.kill)
            return worker

        stuck = start("stuck")
        assert stuck.stdout is not None
        assert stuck.stdout.readline() == "in the middle of an epoch\n"
        other = start()
        stuck.kill()
        assert other.wait(120) == 0
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path}/study.db")
    assert sorted(numbers(study)) == sorted(through)
    failed = [trial for trial in study.trials if trial.state.name == "FAIL" and "not counted" not in trial.user_attrs]
    repeated = [trial for trial in study.trials if trial.system_attrs.get("failed_trial") == failed[0].number]
    assert len(failed) == len(repeated) == 1
    assert repeated[0].params == failed[0].params
    epochs = (tmp_path / "epochs.txt").read_text().splitlines()
    assert sorted(epochs) == sorted(f"{dict(values)['amount']} {epoch}" for values, _ in through for epoch in range(2))
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"module": nn.Linear(2, 2)}, TypeError, "expected a LightningModule, found Linear"),
        ({"objectives": {}}, ValueError, "expected an objective"),
        ({"objectives": {"val_los": "min"}}, ValueError, r"found .*'val_loss'"),
        ({"objectives": {"val_loss": "minimize"}}, ValueError, "minimize"),
        ({"trainer": {"max_epochs": 1, "callbacks": []}}, ValueError, "expected callbacks in `space`"),
        ({"trainer": {"accelerator": "cpu"}}, ValueError, "expected the length of a trial"),
        ({"space": []}, ValueError, r"`tune\(space=...\)`: expected a list of callbacks .*found no range"),
        ({"space": lambda trial: []}, ValueError, "expected a function that draws at least one value, found one that"),
        ({"space": lambda trial: [trial]}, TypeError, "expected a list of callbacks, found list"),
        ({"space": [{"class_path": "Prunning", "init_args": {"a": {"low": 1, "high": 2}}}]}, ValueError, "Prunning"),
        ({"trainer": {**QUICK, "devices": 2}}, ll.errors.UnsupportedError, "expected trials of one process, found 2"),
        ({"pruner": optuna.pruners.MedianPruner}, TypeError, "expected an object of `optuna.pruners`, found <class"),
        ({"measure": lambda module: None}, TypeError, r"returns objectives by name, found .* NoneType"),
        ({"storage": Path()}, ValueError, r"`tune\(storage='.'\)`: .* that cannot be opened"),
        ({"checkpoints": "runs"}, ValueError, r"`tune\(checkpoints='runs'\)`: expected a storage with heartbeats"),
        (
            {"objectives": {"val_loss": "min", "macs": "min"}, "pruner": optuna.pruners.MedianPruner()},
            ValueError,
            "expected one objective, found 2",
        ),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        tuned(trials=1, **change)


def test_loaders_have_to_be_made_for_every_trial() -> None:
    with pytest.raises(TypeError, match="write `data=lambda"):
        ll.tune(seeded(), [1], SPACE, objectives={"val_loss": "min"}, trials=1, trainer=QUICK)


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # as Python itself marks what cannot be imported
    with pytest.raises(ll.errors.UnsupportedError, match=r"pip install lightning-light\[search\]"):
        tuned()
