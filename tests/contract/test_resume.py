"""A run that is interrupted after any step, or at the end of any epoch, and resumed equals the uninterrupted run."""

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch

from lightning_light.surgery.attachment import state_of
from tests.contract.case import Case
from tests.contract.runs import assert_changed, checkpoints, differences, module_of, outcome, trainer
from tests.contract.table import CASES, FULL

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # no need to save again

HOSTS = [lightning.pytorch, pytorch_lightning]
FILES = [*(f"step={step}" for step in range(1, 12)), "epoch=0", "epoch=1"]
FEW = ["step=4", "step=7", "epoch=1"]  # after the last batch of an epoch, in the middle of one, and at its end
FIRST = {row.id for row in FULL if not row.marks}


def fitted(
    case: Case, folder: Path, host: Any, *, resume: Path | None = None, every: int = 1
) -> tuple[dict[str, Any], list[float]]:
    """What a run ends with; without ``resume``, it leaves a checkpoint after ``every`` steps and every epoch."""
    torch.manual_seed(3)
    module = module_of(case, host=host)
    saving = checkpoints(folder, host, every) if resume is None else []
    run = trainer(*case.build(folder), *saving, host=host)
    run.fit(module, ckpt_path=resume)
    assert_changed(case, module)
    compression_state = state_of(module)
    return {
        **outcome(run, module),
        "compression_state": compression_state.state,
        "edit_log": compression_state.edit_log,
        "claims": {method: vars(claim) for method, claim in compression_state.claims.items()},
        "references": compression_state.references,
    }, module.losses


def compare(case: Case, folder: Path, host: Any, files: list[str]) -> None:
    whole, losses = fitted(case, folder, host, every=7 if files == ["step=7"] else 1)
    for file in files:
        resumed, later = fitted(case, folder / "again", host, resume=folder / f"{file}.ckpt")
        assert losses[-len(later) :] == later, f"{case} from {file}: losses"
        assert not differences(whole, resumed), f"{case} from {file}: {differences(whole, resumed)}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_and_resumes(case, tmp_path) -> None:
    compare(case, tmp_path, HOSTS[0], FEW if case.name in FIRST else ["step=7"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_resumes_from_every_step_and_epoch(case, tmp_path) -> None:
    compare(case, tmp_path, HOSTS[0], FILES)


@pytest.mark.parametrize("case", FULL)
def test_fits_and_resumes_under_the_other_host(case, tmp_path) -> None:
    compare(case, tmp_path, HOSTS[1], ["step=7"])
