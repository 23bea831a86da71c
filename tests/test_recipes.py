"""Every recipe in ``examples/configs`` ends with the weights of its Python twin, bit for bit."""

import importlib
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

import lightning_light as ll
from lightning_light.cli import LightningLightCLI
from lightning_light.reparameterization import ACB
from lightning_light.slimmable import SlimmableTraining

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
PROGRAMS = {"gates", "prune", "quantize", "reparameterize_int8", "search", "space"}  # tested with the programs
TWINS: dict[str, Callable[[], Any]] = {
    "block_sparsity": lambda: ll.WeightPruning(
        ll.Sparsity(0.7), pattern=ll.Block(4, 1), targets=ll.Targets("blocks.*")
    ),
    "clustering": lambda: ll.WeightClustering(16),
    "depth": lambda: ll.DepthPruning(ll.MACs(0.8)),
    "dynamic_sparse_training": lambda: ll.DynamicSparseTraining(ll.Sparsity(0.9), method=ll.RigL()),
    "low_rank_and_cluster": lambda: [
        ll.LowRankFactorization(ll.MACs(0.8)),
        ll.WeightClustering(16, start=0.7),
        ll.CompressionMonitor(),
        export("low_rank_and_cluster/clustered"),
    ],
    "low_rank_and_distill": lambda: [
        ll.KnowledgeDistillation("self", losses=[ll.SoftTargets(temperature=4.0)]),
        ll.LowRankFactorization(ll.MACs(0.8)),
        export("low_rank_and_distill/factorized"),
        ll.CompressionReport("runs/low_rank_and_distill/report.html"),
    ],
    "low_rank": lambda: ll.LowRankFactorization(ll.MACs(0.8)),
    "quantization_aware_training": lambda: ll.QuantizationAwareTraining(ll.Int8(), calibration_batches=4),
    "reparameterization": lambda: ll.Reparameterization(ACB(), merge=0.9),
    "self_distillation": lambda: ll.KnowledgeDistillation(ll.SelfTeacher(decay=0.99)),
    "slimmable": lambda: SlimmableTraining([1.0, 0.75, 0.5, 0.25], start=0.2),
    "sr_ste": lambda: ll.SRSTE(ll.NM(2, 4), targets=SPARSE),
    "substitution": lambda: ll.Substitution(ll.MACs(0.7)),
    "two_of_four": lambda: ll.WeightPruning(pattern=ll.NM(2, 4), targets=SPARSE),
    "two_of_four_and_quantize": lambda: [
        ll.WeightPruning(pattern=ll.NM(2, 4), targets=SPARSE),
        ll.QuantizationAwareTraining(ll.Int8(), calibration_batches=4),
        ll.CompressionMonitor(),
        export("two_of_four_and_quantize/int8"),
    ],
    "weight_pruning": lambda: ll.WeightPruning(ll.Sparsity(0.9)),
}
SPARSE = ll.Targets(exclude="stem.0")
LENGTH: dict[str, Any] = {"max_epochs": 4, "limit_train_batches": 5, "limit_val_batches": 0, "accelerator": "cpu"}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def export(name: str) -> ll.MobileExport:
    return ll.MobileExport(f"runs/{name}.ptl")


def test_every_recipe_has_a_twin() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - PROGRAMS == set(TWINS)


def test_every_callback_is_in_a_recipe() -> None:
    public = (getattr(ll, name) for name in ll.__all__)
    callbacks = {
        each.__name__ for each in public if isinstance(each, type) and issubclass(each, ll.CompressionCallback)
    }
    used = {name for path in CONFIGS.glob("*.yaml") for name in re.findall(r"class_path: (\w+)", path.read_text())}
    assert callbacks - used == {"CompressionCallback"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("name", TWINS)
def test_a_recipe_ends_with_the_weights_of_its_twin(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CONFIGS.parent)
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    monkeypatch.chdir(tmp_path)
    example = importlib.import_module("01_prune_and_export")
    draw = np.random.default_rng(0)
    images = {part: draw.integers(0, 256, (60, 28, 28), np.uint8) for part in ("x_train", "x_test")}
    np.savez("data.npz", **images, **{part: draw.integers(0, 10, 60) for part in ("y_train", "y_test")})
    options = [f"--trainer.{key}={str(value).lower()}" for key, value in (LENGTH | QUIET).items()]
    small = ["--model.width=16", "--data.data=data.npz", "--data.batch_size=10"]
    arguments = ["fit", f"--config={CONFIGS / name}.yaml", *options, *small]
    run = LightningLightCLI(
        example.Classifier, example.FashionMNIST, args=arguments, save_config_callback=None, seed_everything_default=0
    )
    started = time.time_ns()
    L.seed_everything(0, verbose=False)
    data = example.FashionMNIST("data.npz", batch_size=10)
    module = example.Classifier(width=16)
    twin = TWINS[name]()
    L.Trainer(callbacks=twin if isinstance(twin, list) else [twin], **LENGTH, **QUIET).fit(module, datamodule=data)
    for path in Path("runs").rglob("*.*"):
        assert path.stat().st_mtime_ns > started, path  # the twin writes the files of the recipe
    expected = module.state_dict()
    found = run.model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
