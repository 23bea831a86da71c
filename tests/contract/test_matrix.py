"""The first rows of the covering array of settings; ``python -m tests.contract.matrix FOLDER`` runs all."""

import itertools
import json
import random

import pytest

from tests.contract.matrix import FACTORS, covering_array, is_supported
from tests.test_kill import script


def test_every_two_values_occur_together() -> None:
    factors = {name: options[:4] for name, options in FACTORS.items()}
    for supported in (lambda row: True, is_supported):
        rows = covering_array(factors, random.Random(1), supported)
        assert all(map(supported, rows))
        for (a, first), (b, second) in itertools.combinations(factors.items(), 2):
            pairs = {(x, y) for x, y in itertools.product(first, second) if supported({a: x, b: y})}
            assert {(row[a], row[b]) for row in rows} == pairs
        assert len(rows) < 60


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_first_rows(tmp_path) -> None:
    found = json.loads(script("contract.matrix", tmp_path, 4, 0, timeout=1200).splitlines()[-1])
    assert found["wrong"] == []
