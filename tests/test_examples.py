"""Every example runs as a user runs it, on a small part of its data; the YAML twins end with the same weights."""

import contextlib
import gzip
import importlib
import importlib.util
import io
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import lightning_light as ll

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[0-9]*.py"))
TWINS = ["prune", "quantize"]

pytestmark = pytest.mark.filterwarnings("default")  # as outside of tests


@pytest.fixture(scope="module")
def fashion_mnist() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fashion_mnist", EXAMPLES / "fashion_mnist.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(fashion_mnist: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the images that ship with the examples."""
    path: Path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, **{name: array[:500] for name, array in fashion_mnist.load(fashion_mnist.EMBEDDED).items()})
    return path


@pytest.fixture(scope="module")
def chain(fashion_mnist: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the chain of all methods ran, on enough images to round, and what it printed."""
    folder = tmp_path_factory.mktemp("chain")
    arrays = fashion_mnist.load(fashion_mnist.EMBEDDED)
    np.savez(folder / "small.npz", **{name: array[:1000] for name, array in arrays.items()})
    return folder, run(EXAMPLES / "06_quantize.py", "--data=small.npz", "--epochs=5", folder=folder)


@pytest.fixture(scope="module")
def main_job(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the main job ran, and what it printed."""
    folder = tmp_path_factory.mktemp("main_job")
    return folder, run(EXAMPLES / "01_prune_and_export.py", f"--data={small}", "--epochs=2", folder=folder)


def run(script: Path, *arguments: str, folder: Path) -> str:
    """What the script prints, run in ``folder`` as from a command line, without the seconds that a new Python takes."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.syspath_prepend(script.parent)
        patch.setattr(sys, "argv", [script.name, *arguments])
        patch.setenv("COLUMNS", "160")
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code:  # 0 after ``--print_config``
                raise
    return printed.getvalue()


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint that the last run in ``out`` wrote."""
    checkpoints = out.glob("lightning_logs/version_*/checkpoints/*.ckpt")
    last = max(checkpoints, key=lambda path: path.parent.parent.name)
    weights: dict[str, torch.Tensor] = torch.load(last, weights_only=True)["state_dict"]
    return weights


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_has_a_docstring(script: Path) -> None:
    text = script.read_text()
    assert text.count("\n") < 110
    assert text.startswith('"""')


def test_the_main_job_prunes_exports_and_compares(main_job: tuple[Path, str]) -> None:
    folder, printed = main_job
    out = folder / "runs" / "prune_and_export"
    rows = {words[0]: words for line in printed.splitlines() if (words := re.findall(r"[\w.,%]+", line))}
    dense, pruned = (float(rows[name][rows[name].index("M") - 1]) for name in ("dense", "pruned"))
    assert pruned <= 0.42 * dense
    assert (out / "pruned.ptl").stat().st_size < (out / "dense.ptl").stat().st_size
    assert (out / "pruned.ptl.json").exists()


@pytest.mark.slow
def test_sparse_training_compares_four_ways_and_draws_them(small: Path, tmp_path: Path) -> None:
    printed = run(EXAMPLES / "02_sparse_training.py", f"--data={small}", "--epochs=3", folder=tmp_path)
    zeros = dict(re.findall(r"(dense|gradual 90 %|RigL 90 %|2:4)[^\d]+[\d.]+%[^\d]+([\d.]+)%", printed))
    assert zeros == {"dense": "0.00", "gradual 90 %": "90.00", "RigL 90 %": "90.00", "2:4": zeros["2:4"]}
    assert 49.0 < float(zeros["2:4"]) <= 50.0  # the first layer, which has one input, stays dense
    assert (tmp_path / "runs" / "sparse_training" / "sparse_training.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("03_distill", ["teacher", "student alone", "student with teacher"]),
        ("04_distill_while_pruning", ["dense", "pruned alone", "pruned with itself as teacher"]),
    ],
)
def test_distillation_ends_with_a_table(name: str, rows: list[str], small: Path, tmp_path: Path) -> None:
    printed = run(EXAMPLES / f"{name}.py", f"--data={small}", "--epochs=2", folder=tmp_path)
    table = printed[printed.index("Before -> after") :]
    assert re.findall(r"^│ (.*?) +│ [\d.]+%", table, re.MULTILINE) == rows


@pytest.mark.slow
def test_low_rank_factorizes_and_clusters(small: Path, tmp_path: Path) -> None:
    printed = run(EXAMPLES / "05_low_rank.py", f"--data={small}", "--epochs=3", folder=tmp_path)
    macs = dict(re.findall(r"^│ (dense|factorized) .*? ([\d.]+) M ", printed, re.MULTILINE))
    assert float(macs["factorized"]) <= 0.51 * float(macs["dense"])
    out = tmp_path / "runs" / "low_rank"
    factorized, clustered = ((out / f"{name}.safetensors").stat().st_size for name in ("factorized", "clustered"))
    assert clustered < 0.5 * factorized


@pytest.mark.slow
def test_learned_gates_prune_to_the_budget(small: Path, tmp_path: Path) -> None:
    arguments = [f"--data={small}", "--epochs=2", "--steps=3"]
    printed = run(EXAMPLES / "07_learned_gates.py", *arguments, folder=tmp_path)
    macs = dict(re.findall(r"(dense|magnitude|learned gates)[^\n]*?([\d.]+) M ", printed))
    assert all(0.27 < float(macs[name]) / float(macs["dense"]) <= 0.31 for name in ("magnitude", "learned gates"))
    out = tmp_path / "runs" / "learned_gates"
    python, config = final_weights(out), EXAMPLES / "configs" / "gates.yaml"
    changes = [f"--data.data={small}", "--trainer.max_epochs=2"]
    gates = "--trainer.callbacks.criterion.init_args.steps=3"
    run(EXAMPLES / "cli.py", "fit", f"--config={config}", *changes, gates, folder=tmp_path)
    yaml = final_weights(out)
    assert len(list(out.glob("lightning_logs/version_*"))) == 4
    assert [name for name in python if not torch.equal(python[name], yaml[name])] == []


@pytest.mark.slow
def test_tuning_ends_with_a_config_that_repeats_the_best_trial(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    arguments = [f"--data={small}", "--dense-epochs=1", "--epochs=1", "--trials=3"]
    printed = run(EXAMPLES / "09_tune.py", *arguments, folder=tmp_path)
    assert re.search(r"\d \* ", printed)
    assert printed.endswith(run(EXAMPLES / "09_tune.py", *arguments, folder=tmp_path))
    out = tmp_path / "runs" / "tune"
    assert (out / "pareto.png").exists()
    (best,) = re.findall(r"val_accuracy: ([\d.]+)", (out / "best.yaml").read_text())
    log = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=csv"]
    run(EXAMPLES / "cli.py", "fit", "--config=runs/tune/best.yaml", *log, folder=tmp_path)
    header, *lines = next(tmp_path.glob("csv/**/metrics.csv")).read_text().splitlines()
    found = [line.split(",")[header.split(",").index("val_accuracy")] for line in lines]
    assert [float(accuracy) for accuracy in found if accuracy] == [float(best)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_chain_with_branches_ends_in_an_int8_file_as_accurate_as_the_trainer_and_its_yaml_twin(
    small: Path, tmp_path: Path
) -> None:
    arguments = [f"--data={small}", "--epochs=8"]  # enough steps to calibrate and quantize
    printed = run(EXAMPLES / "10_reparameterize_int8.py", *arguments, folder=tmp_path)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    rows = {name: numbers for name, _, *numbers in (line for line in cells if len(line) == 7)}
    assert abs(float(rows["int8"][0].removesuffix("%")) - float(rows["int8"][1].removesuffix("%"))) <= 0.4  # 2 of 500
    assert float(rows["int8"][2].removesuffix(" M")) <= 0.505 * float(rows["dense"][2].removesuffix(" M"))
    out = tmp_path / "runs" / "reparameterize"
    assert (out / "int8.ptl").stat().st_size < 0.25 * (out / "dense.ptl").stat().st_size
    python, config = final_weights(out), EXAMPLES / "configs" / "reparameterize_int8.yaml"
    changes = [f"--data.data={small}", "--trainer.max_epochs=8"]
    run(EXAMPLES / "cli.py", "fit", f"--config={config}", *changes, folder=tmp_path)
    yaml = final_weights(out)
    assert len(list(out.glob("lightning_logs/version_*"))) == 3
    assert python.keys() == yaml.keys()
    assert [name for name in python if not torch.equal(python[name], yaml[name])] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_meets_both_budgets(small: Path, tmp_path: Path) -> None:
    arguments = [f"--data={small}", "--epochs=4", "--evaluations=1"]
    printed = run(EXAMPLES / "08_search.py", *arguments, folder=tmp_path)
    rows = dict(re.findall(r"│ (dense|channels alone|search) +│[^│]+│ +([\d.]+) M │", printed))
    assert float(rows["search"]) <= 0.401 * float(rows["dense"])
    out = tmp_path / "runs" / "search"
    assert (out / "searched.ptl").stat().st_size <= 1.02 * 90_000 < (out / "dense.ptl").stat().st_size
    assert (out / "table.json").exists()
    python, config = final_weights(out), EXAMPLES / "configs" / "search.yaml"
    changes = [f"--data.data={small}", "--trainer.max_epochs=4", "--trainer.callbacks.evaluations=1"]
    run(EXAMPLES / "cli.py", "fit", f"--config={config}", *changes, folder=tmp_path)
    yaml = final_weights(out)
    assert len(list(out.glob("lightning_logs/version_*"))) == 4
    assert [name for name in python if not torch.equal(python[name], yaml[name])] == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # exporters take their time on a busy machine
def test_one_run_prunes_distils_and_quantizes_for_every_runtime(chain: tuple[Path, str]) -> None:
    folder, printed = chain
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    rows = {(name, runtime): numbers for name, runtime, *numbers in (line for line in cells if len(line) == 7)}
    runtimes = {"TorchScriptLite": ".ptl", "ONNX": ".onnx", "ExecuTorch": ".pte"}
    assert list(rows) == [(name, runtime) for name in ("dense", "int8") for runtime in runtimes]
    for module, file, *_ in rows.values():
        assert abs(float(module.removesuffix("%")) - float(file.removesuffix("%"))) <= 1.0
    for runtime, suffix in runtimes.items():
        dense, int8 = (folder / "runs" / "quantize" / f"{name}{suffix}" for name in ("dense", "int8"))
        assert int8.stat().st_size < 0.25 * dense.stat().st_size
        before, after = (float(rows[name, runtime][2].removesuffix(" M")) for name in ("dense", "int8"))
        assert after <= 0.41 * before


def test_a_runtime_that_is_missing_is_said_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as Python itself marks what cannot be imported
    example = importlib.import_module("06_quantize")
    assert example.installed(ll.TorchScriptLite(), ll.ONNX()) == [ll.TorchScriptLite()]
    assert "pip install lightning-light[onnx]" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("config", TWINS)
def test_the_yaml_twin_ends_with_the_same_weights(
    config: str, request: pytest.FixtureRequest, small: Path, tmp_path: Path
) -> None:
    folder, _ = request.getfixturevalue("main_job" if config == "prune" else "chain")
    folder = Path(shutil.copytree(folder, tmp_path / "twin"))  # with the teacher
    out = folder / "runs" / ("prune_and_export" if config == "prune" else "quantize")
    python = final_weights(out)
    data, epochs = (small, 2) if config == "prune" else ("small.npz", 5)
    run(
        EXAMPLES / "cli.py",
        "fit",
        f"--config={EXAMPLES / 'configs' / config}.yaml",
        f"--data.data={data}",
        f"--trainer.max_epochs={epochs}",
        folder=folder,
    )
    assert len(list(out.glob("lightning_logs/version_*"))) == 3
    yaml = final_weights(out)
    assert python.keys() == yaml.keys()
    assert [name for name in python if not torch.equal(python[name], yaml[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("config", [*TWINS, "search"])
def test_a_printed_config_reads_back(config: str, tmp_path: Path) -> None:
    arguments = f"--config={EXAMPLES / 'configs' / config}.yaml", "--print_config"
    printed = run(EXAMPLES / "cli.py", "fit", *arguments, folder=tmp_path)
    (tmp_path / "printed.yaml").write_text(printed)
    again = run(EXAMPLES / "cli.py", "fit", "--config=printed.yaml", "--print_config", folder=tmp_path)
    assert again == printed


def test_the_embedded_part_is_what_it_says(fashion_mnist: ModuleType) -> None:
    arrays = fashion_mnist.load(fashion_mnist.EMBEDDED)
    assert arrays["x_train"].shape == arrays["x_test"].shape == (10_000, 28, 28)
    assert np.bincount(arrays["y_test"]).tolist() == [1000] * 10
    assert all(array.dtype == np.uint8 for array in arrays.values())


def test_the_official_files_are_read(fashion_mnist: ModuleType, tmp_path: Path) -> None:
    images, labels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28), np.array([7, 0, 9], np.uint8)
    for name, file in fashion_mnist.IDX_FILES.items():
        array = images if name.startswith("x") else labels
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (tmp_path / file).write_bytes(gzip.compress(header + array.tobytes()))
    arrays = fashion_mnist.load(tmp_path)
    assert np.array_equal(arrays["x_test"], images)
    assert np.array_equal(arrays["y_train"], labels)


def test_predicted_residuals_are_unpacked(fashion_mnist: ModuleType, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 5, 6), np.uint8)
    residuals = images.copy()
    for n, _, y, x in np.ndindex(images.shape):
        west, north, corner = (
            int(images[n, 0, b, a]) if b >= 0 and a >= 0 else 0 for b, a in ((y, x - 1), (y - 1, x), (y - 1, x - 1))
        )
        if corner >= max(west, north):  # Weinberger et al., 2000, "The LOCO-I Lossless Image Compression Algorithm"
            predicted = min(west, north)
        elif corner <= min(west, north):
            predicted = max(west, north)
        else:
            predicted = west + north - corner
        predicted = west if y == 0 else north if x == 0 else predicted
        residuals[n, 0, y, x] = (int(images[n, 0, y, x]) - predicted) % 256
    labels = np.zeros(2, np.uint8)
    path = tmp_path / "packed.npz"
    np.savez(path, **{"x_train@med": residuals, "x_test@med": residuals, "y_train": labels, "y_test": labels})
    assert np.array_equal(fashion_mnist.load(path)["x_test"], images[:, 0])


def test_a_missing_data_file_is_one_clear_sentence(fashion_mnist: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`data=.*nowhere`: expected an `.npz` file or a folder with .*found"):
        fashion_mnist.load(tmp_path / "nowhere")
