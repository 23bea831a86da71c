"""The first rows of the covering array of settings; ``python -m tests.contract.matrix FOLDER`` runs all."""

import itertools
import json
import random

import pytest

from tests.contract.matrix import FACTORS, covering_array
from tests.test_kill import script


def test_every_two_values_occur_together() -> None:
    factors = {name: options[:4] for name, options in FACTORS.items()}
    rows = covering_array(factors, random.Random(1))
    for (a, first), (b, second) in itertools.combinations(factors.items(), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(first, second))
    assert len(rows) < 60


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_first_rows(tmp_path) -> None:
    found = json.loads(script("contract.matrix", tmp_path, 4, 0, timeout=1200).splitlines()[-1])
    assert found["wrong"] == []
