"""Two ranks change one network alike, or both stop; what cannot follow is refused before anything is trained."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_light.errors import UnsupportedError
from lightning_light.surgery.distributed import check_agreement, digest, log_rank_zero, reduce_mean, refuse_unsupported
from tests.surgery.runs import HOSTS, Events, Lit, Loader, trainer

ROOT = Path(__file__).parents[2]


CASES = ["plain", "unused", "static", "views", "accumulate"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each rank has found; one start of two processes for all."""
    folder, cases = tmp_path_factory.mktemp("ddp"), [*CASES, "disagree"]
    command = [sys.executable, "-m", "tests.surgery.ddp_script", str(folder), *cases]
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    files = {case: [folder / f"{case}-{rank}.json" for rank in (0, 1)] for case in cases}
    assert all(file.exists() for both in files.values() for file in both), done.stderr[-3000:]
    return {case: [json.loads(file.read_text()) for file in both] for case, both in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_end_identical_and_resume(case, found) -> None:
    for rank in found[case]:
        assert rank == {
            "apart": [0.0, 0.0],
            "width": 2,
            "shapes": [[2, 3, 8, 8]],  # the example input is the batch's images, not `training_step`'s arguments
            "wrapped": [True, True],
            "resumed": True,
        }


@pytest.mark.slow
def test_a_disagreement_is_raised_on_both_ranks(found) -> None:
    for rank in found["disagree"]:
        assert "Expected what `Cuts` did to be the same on all 2 ranks, found 2 versions" in rank["error"]


def refusal(**options: Any) -> str:
    run = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, **options)
    with pytest.raises(UnsupportedError) as caught:
        refuse_unsupported(run, "StructuredPruning")
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_launchers_that_return_weights_are_refused(strategy) -> None:
    sentence = refusal(accelerator="cpu", devices=2, strategy=strategy)
    assert "`StructuredPruning` with processes started by '" in sentence
    assert "Use `strategy='ddp'` in a script; in a notebook, one device." in sentence


def test_sharding_strategies_are_refused() -> None:
    sharded = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    sentence = refusal(accelerator="cpu", devices=1, strategy=sharded)
    assert "`StructuredPruning` with `ModelParallelStrategy`" in sentence
    assert "load the small network and shard that" in sentence
    assert FSDPStrategy().restore_checkpoint_after_setup  # needs a GPU to be given to a Trainer; this is what is asked
    deepspeed = pl.strategies.DeepSpeedStrategy  # needs a package that is not on this machine
    assert deepspeed.restore_checkpoint_after_setup.fget(object.__new__(deepspeed))


@pytest.fixture
def processes(monkeypatch) -> Iterator[None]:
    """A strategy may start a process group in this very process: it is gone afterwards, as is what it told others."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("processes")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_the_refusal_is_raised_in_setup() -> None:
    module = Lit()
    with pytest.raises(UnsupportedError, match="`Events` with `ModelParallelStrategy`"):
        trainer(Events(), strategy=ModelParallelStrategy(1, 1)).fit(module, Loader())
    assert module.losses == []


def test_precision_plugins_that_replace_layers_are_refused() -> None:
    class TransformerEnginePrecision(pl.plugins.precision.Precision):
        """A stand-in by name: the real one needs a package that is not on this machine."""

    sentence = refusal(accelerator="cpu", devices=1, plugins=[TransformerEnginePrecision()])
    assert "precision plugin that replaces them" in sentence


@pytest.mark.parametrize("host", HOSTS)
def test_one_process_agrees_with_itself(host, caplog) -> None:
    run = trainer(host=host)
    check_agreement(run, "anything", object())  # not even looked at
    tensor = torch.tensor([1.0, 2.0])
    mean = reduce_mean(run, tensor)
    assert torch.equal(mean, tensor)
    assert mean is not tensor
    with caplog.at_level(logging.INFO):
        log_rank_zero(run, "a line")
    assert [(r.name, r.message) for r in caplog.records][-1:] == [(f"{host.__name__}.lightning_light", "a line")]


def test_digests_differ_where_values_differ() -> None:
    values = [
        None,
        1,
        True,
        1.0,
        "1",
        [1],
        [[1]],
        {"a": 1},
        {"a": [1]},
        {1: 1},
        torch.tensor([1, 2]),
        torch.tensor([[1, 2]]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor(1),
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    assert digest(torch.arange(6).reshape(2, 3).T) == digest(torch.arange(6).reshape(2, 3).T.contiguous())
