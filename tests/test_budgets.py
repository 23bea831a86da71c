import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_light.budgets import Budget, Channels, Latency, MACs, Params, Size, Sparsity

BUDGETS: list[Budget] = [MACs(0.4), Params(0.3), Channels(0.5), Size("2 MB"), Latency("4 ms"), Sparsity(0.9)]


@pytest.mark.parametrize("kind", [MACs, Params, Channels])
def test_a_share_remains(kind: type[MACs]) -> None:
    assert kind(0.25).goal(200.0) == 50.0
    assert kind(1.0).goal(200.0) == 200.0


def test_absolute_goals_do_not_depend_on_the_dense_model() -> None:
    assert Size("2 MB").goal(7e6) == 2_000_000.0
    assert Latency("4 ms").goal(1.0) == 0.004
    assert Sparsity(0.9).goal(0.1) == 0.9


@pytest.mark.parametrize("budget", BUDGETS, ids=repr)
@given(dense=st.floats(0.0, 1e12), share=st.floats(0.0, 1.0))
def test_the_way_starts_at_dense_and_ends_at_the_goal(budget: Budget, dense: float, share: float) -> None:
    goal = budget.goal(dense)
    assert budget.at(dense, 0.0) == dense
    assert budget.at(dense, 1.0) == pytest.approx(goal, abs=1e-12 * max(dense, 1.0))
    low, high = sorted((dense, goal))
    assert low - 1e-9 * max(high, 1.0) <= budget.at(dense, share) <= high + 1e-9 * max(high, 1.0)


def test_every_budget_names_its_quantity() -> None:
    assert [budget.quantity for budget in BUDGETS] == ["macs", "params", "channels", "bytes", "seconds", "zeros"]


@pytest.mark.parametrize(
    ("limit", "size"),
    [
        ("2 MB", 2_000_000),
        ("2MB", 2_000_000),
        ("500 kB", 500_000),
        ("500 kb", 500_000),
        ("1.5 MiB", 1_572_864),
        ("0.5 GB", 500_000_000),
        ("1 GiB", 2**30),
        ("12 B", 12),
        (4096, 4096),
        (" .5 KiB ", 512),
    ],
)
def test_sizes(limit: str | int, size: int) -> None:
    assert Size(limit).bytes == size
    assert Size(limit).limit == limit


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("4 ms", 0.004),
        ("250 us", 0.00025),
        ("250 µs", 0.00025),
        ("250 μs", 0.00025),
        ("1.5 s", 1.5),
        (0.01, 0.01),
        (2, 2.0),
    ],
)
def test_latencies(limit: str | float, seconds: float) -> None:
    assert Latency(limit).seconds == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "limit", ["", "MB", "2", "2 XB", "two MB", "-2 MB", "0 MB", "2 MB MB", "2 ms", 0, -5, True, 1.5]
)
def test_what_is_no_size_is_refused(limit: object) -> None:
    with pytest.raises(ValueError, match=r"`Size\(.*\)`: expected .*Write for instance `Size\('2 MB'\)`"):
        Size(limit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "limit", ["", "ms", "4", "4 parsecs", "-4 ms", "0 ms", "4 MB", 0.0, -1.0, math.nan, False, None]
)
def test_what_is_no_time_is_refused(limit: object) -> None:
    with pytest.raises(ValueError, match=r"`Latency\(.*\)`: expected .*Write for instance `Latency\('4 ms'\)`"):
        Latency(limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [MACs, Params, Channels])
@pytest.mark.parametrize("remaining", [0.0, -0.1, 1.01, 40.0, math.nan])
def test_what_is_no_share_is_refused(kind: type[MACs], remaining: float) -> None:
    with pytest.raises(ValueError, match=rf"`{kind.__name__}\(remaining=.*\)`: expected 0 < remaining <= 1"):
        kind(remaining)


@pytest.mark.parametrize("amount", [-0.1, 1.1, 90.0, math.nan])
def test_sparsity_is_a_fraction(amount: float) -> None:
    with pytest.raises(ValueError, match=r"`Sparsity\(amount=.*\)`: expected 0 <= amount <= 1"):
        Sparsity(amount)


@pytest.mark.parametrize("budget", BUDGETS, ids=repr)
def test_a_budget_is_a_value(budget: Budget) -> None:
    assert eval(repr(budget)) == budget
    assert hash(budget) == hash(eval(repr(budget)))
