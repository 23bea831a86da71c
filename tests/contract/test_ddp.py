"""Two real processes: equal after every event, resumed alike, and a disagreement is noticed by both."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.contract.table import CASES

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROWS = [case for case in CASES if "ddp" not in case.refuses]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Row -> what each rank has found; one start of two processes for all rows that were asked for."""
    folder = tmp_path_factory.mktemp("ddp")
    asked = {item.callspec.params["case"].name for item in request.session.items if item.path == Path(__file__)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.ddp_script", str(folder), *asked],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in asked}


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_ranks_are_equal_after_every_step(case, found) -> None:
    for rank in found[case.name]:
        assert rank["apart"] == rank["apart_resumed"] == []
        assert (rank["events"] > 1) == case.structural


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_a_resumed_run_of_two_ranks_equals_the_whole(case, found) -> None:
    for rank in found[case.name]:
        assert rank["resumed"] == {file: [] for file in rank["resumed"]}
        assert rank["resumed"]


@pytest.mark.parametrize("case", [case for case in ROWS if case.plant], ids=str)
def test_a_disagreement_is_noticed_by_every_rank(case, found) -> None:
    for rank in found[case.name]:
        assert type(case.build(ROOT)[0]).__name__ in rank["mismatch"]
