import time

import numpy as np
import pytest
import torch

from lightning_light.measure.latency import _quantile, measure_latency


def test_every_call_is_made_and_only_the_later_ones_are_timed() -> None:
    pauses = iter([0.05, 0.05, *[0.0] * 9])
    latency = measure_latency(lambda: time.sleep(next(pauses)), warmup=2, runs=9)
    assert next(pauses, None) is None
    assert latency.runs == 9
    assert 0.0 < latency.p10 <= latency.median <= latency.p90 < 0.05


def test_a_call_that_sleeps_takes_that_long() -> None:
    latency = measure_latency(lambda: time.sleep(0.01), warmup=0, runs=3)
    assert latency.median >= 0.01


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_quantiles_are_those_of_numpy(q: float, count: int) -> None:
    values = sorted(np.random.default_rng(0).random(count).tolist())
    assert _quantile(values, q) == pytest.approx(np.quantile(values, q))


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    seen = []
    latency = measure_latency(lambda: seen.append(torch.get_num_threads()), warmup=0, runs=1, threads=before + 1)
    assert seen == [before + 1]
    assert latency.threads == before + 1
    assert torch.get_num_threads() == before
    assert measure_latency(lambda: None, runs=1).threads == before


def test_threads_are_restored_after_a_failure() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        measure_latency(lambda: 1 / 0, threads=before + 1)
    assert torch.get_num_threads() == before
