"""The guide to extending: its code runs, and what it defines resumes bit for bit."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest

import lightning_light as ll
from tests.contract.case import Case
from tests.contract.test_resume import FEW, compare

GUIDE = Path(__file__).parents[1] / "docs" / "extending.md"
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # no need to save again


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the guide defines, after all its code has run."""
    names: dict[str, Any] = {"__name__": "guide"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("guide"))
        for block in re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE):
            exec(block, names)
    return names


def pruning(guide: dict[str, Any]) -> Any:
    schedule = ll.Window(guide["Root"](), start=0.3, end=0.7)
    return ll.StructuredPruning(
        ll.MACs(0.6), criterion=guide["RelativeGradient"](), schedule=schedule, calibration_batches=2
    )


def pruning_to_traffic(guide: dict[str, Any]) -> Any:
    return ll.StructuredPruning(guide["WeightTraffic"](0.6), ranking=guide["ByWidth"]())


def masking(guide: dict[str, Any]) -> Any:
    criterion, pattern = guide["RelativeGradient"](), guide["Strip"]()
    return ll.WeightPruning(ll.Sparsity(0.6), criterion=criterion, pattern=pattern, calibration_batches=2)


def clipping(guide: dict[str, Any]) -> Any:
    return guide["WeightClipping"](0.05, schedule=ll.Window(guide["Root"](), start=1, end=3))


def distilling(guide: dict[str, Any]) -> Any:
    return ll.KnowledgeDistillation(ll.SelfTeacher(), losses=[guide["ReverseKL"]()])


def quantizing(guide: dict[str, Any]) -> Any:
    return ll.QuantizationAwareTraining(guide["SixBits"](), start=0.3, calibration_batches=2)


@pytest.mark.parametrize(
    "build", [pruning, pruning_to_traffic, masking, clipping, distilling, quantizing], ids=lambda build: build.__name__
)
def test_an_extension_of_the_guide_resumes_bit_for_bit(build, guide, tmp_path) -> None:
    case = Case(build.__name__, lambda folder: [build(guide)], structural=build.__name__.startswith("pruning"))
    compare(case, tmp_path, lightning.pytorch, FEW)
