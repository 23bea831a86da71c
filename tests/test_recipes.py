"""Every short recipe in ``examples/configs`` ends with the weights of its Python twin, bit for bit."""

import importlib
import sys
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

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
PROGRAMS = {"gates", "prune", "quantize", "reparameterize_int8", "search", "space"}  # tested with the programs
TWINS: dict[str, Callable[[], Any]] = {
    "block_sparsity": lambda: ll.WeightPruning(
        ll.Sparsity(0.7), pattern=ll.Block(4, 1), targets=ll.Targets("blocks.*")
    ),
    "clustering": lambda: ll.WeightClustering(16),
    "depth": lambda: ll.DepthPruning(ll.MACs(0.8)),
    "dynamic_sparse_training": lambda: ll.DynamicSparseTraining(ll.Sparsity(0.9), method=ll.RigL()),
    "low_rank": lambda: ll.LowRankFactorization(ll.MACs(0.8)),
    "quantization_aware_training": lambda: ll.QuantizationAwareTraining(ll.Int8(), calibration_batches=4),
    "reparameterization": lambda: ll.Reparameterization(ACB(), merge=0.9),
    "self_distillation": lambda: ll.KnowledgeDistillation(ll.SelfTeacher(decay=0.99)),
    "two_of_four": lambda: ll.WeightPruning(pattern=ll.NM(2, 4), targets=ll.Targets(exclude="stem.0")),
    "weight_pruning": lambda: ll.WeightPruning(ll.Sparsity(0.9)),
}
LENGTH: dict[str, Any] = {"max_epochs": 4, "limit_train_batches": 5, "limit_val_batches": 0, "accelerator": "cpu"}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_every_recipe_has_a_twin() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - PROGRAMS == set(TWINS)


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
    L.seed_everything(0, verbose=False)
    data = example.FashionMNIST("data.npz", batch_size=10)
    module = example.Classifier(width=16)
    L.Trainer(callbacks=[TWINS[name]()], **LENGTH, **QUIET).fit(module, datamodule=data)
    expected = module.state_dict()
    found = run.model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
