import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from lightning_light.budgets import (
    Budget,
    Channels,
    Latency,
    MACs,
    Params,
    RelativeBudget,
    Size,
    Sparsity,
    require_reducible,
)
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.export import TorchScriptLite

BUDGETS: list[Budget] = [MACs(0.4), Params(0.3), Channels(0.5), Size("2 MB"), Latency("4 ms"), Sparsity(0.9)]
IN_RUNTIME = Latency("1 s", TorchScriptLite(), threads=2)


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
    assert [budget.quantity for budget in BUDGETS] == ["macs", "params", "channels", "bytes", "seconds", "sparsity"]


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


@pytest.mark.parametrize("limit", ["", "MB", "2", "2 XB", "two MB", "-2 MB", "0 MB", "2 MB MB", "2 ms", 0, -5])
def test_what_is_no_size_is_refused(limit: object) -> None:
    with pytest.raises(ValueError, match=r"`Size\(.*\)`: expected .*Write for instance `Size\('2 MB'\)`"):
        Size(limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", ["", "ms", "4", "4 parsecs", "-4 ms", "0 ms", "4 MB", 0.0, -1.0, math.nan])
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


@pytest.mark.parametrize("budget", [*BUDGETS, IN_RUNTIME], ids=repr)
def test_a_budget_is_a_value(budget: Budget) -> None:
    assert eval(repr(budget)) == budget
    assert hash(budget) == hash(eval(repr(budget)))


@pytest.mark.parametrize(
    "build", [lambda: Size(True), lambda: Size(1.5), lambda: Latency(False), lambda: Latency(None), lambda: MACs("0.4")]
)
def test_a_limit_of_the_wrong_type_is_refused(build) -> None:
    with pytest.raises(TypeError, match=r"`\w+\(\w+=.*\)`: expected .*, found "):
        build()


def test_a_percentage_is_refused_with_the_fraction() -> None:
    with pytest.raises(ValueError, match=r"`MACs\(remaining=40\)`: .* not a percentage: write `remaining=0.4`"):
        MACs(40)


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)
    )


EXAMPLE = ExampleInput((torch.zeros(2, 3, 8, 8),))


def test_a_budget_measures_its_quantity(net: nn.Module) -> None:
    parameters = 8 * 3 * 9 + 8 + 2 * 8 + 512 * 10 + 10
    assert MACs(0.5).measure(net, EXAMPLE) == 8 * 3 * 9 * 64 + 5120
    assert Params(0.5).measure(net, None) == parameters
    assert Size("1 MB").measure(net, None) == 4 * (parameters + 2 * 8) + 8  # batch norm counts its batches in int64
    assert Channels(0.5).measure(net, EXAMPLE) == 8.0
    assert 0.0 < Latency("1 s").measure(net, EXAMPLE) < 10.0
    with torch.no_grad():
        net[4].weight[:5] = 0.0
    assert Sparsity(0.5).measure(net, None) == pytest.approx(2560 / (216 + 5120))


def test_latency_in_a_runtime_is_that_of_the_file_on_one_sample(net: nn.Module, monkeypatch) -> None:
    found, load = [], TorchScriptLite.load

    def recorded(exporter: TorchScriptLite, path: Path):
        run = load(exporter, path)

        def record(*tensors: torch.Tensor) -> torch.Tensor:
            output = run(*tensors)
            found.append((output.shape, torch.get_num_threads()))
            return output

        return record

    monkeypatch.setattr(TorchScriptLite, "load", recorded)
    net.train()
    assert 0.0 < IN_RUNTIME.measure(net, EXAMPLE) < 1.0
    assert len(found) >= 50
    assert set(found) == {((1, 10), 2)}
    assert net.training


def test_latency_in_a_runtime_needs_forward_and_threads_a_runtime(net: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match=r"expected a call of `forward`.*found one of `training_step`.*example"):
        IN_RUNTIME.measure(net, ExampleInput(EXAMPLE.args, method="training_step"))
    with pytest.raises(
        ValueError, match=r"`Latency\(.*threads=2\)`: expected `threads` of a runtime, found no runtime"
    ):
        Latency("1 s", threads=2)
    with pytest.raises(TypeError, match=r"`Latency\(runtime='onnx'\)`: expected .*Runtime"):
        Latency("1 s", "onnx")


@pytest.mark.parametrize("budget", [MACs(0.5), Params(0.5), Size("1 MB"), Sparsity(0.5)], ids=repr)
def test_the_costs_of_all_tensors_are_the_quantity(budget: Budget, net: nn.Module) -> None:
    with torch.no_grad():
        net[4].weight[:5] = 0.0
    costs = budget.tensor_costs(net, EXAMPLE)
    assert sum(costs.values()) == pytest.approx(budget.measure(net, EXAMPLE))
    assert costs["4.weight"] > costs["0.weight"] or budget == MACs(0.5)


@pytest.mark.parametrize("budget", [MACs(0.5), Channels(0.5), Latency("1 ms")], ids=repr)
def test_a_budget_that_depends_on_the_input_asks_for_an_example(budget: Budget, net: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"expected an example input, on which .* depend, found None"):
        budget.measure(net, None)


def test_a_budget_of_a_user_is_one_class(net: nn.Module) -> None:
    @dataclass(frozen=True)
    class Layers(RelativeBudget):
        quantity = "layers"

        def measure(self, model: nn.Module, example: ExampleInput | None) -> float:
            return float(sum(1 for _ in model.children()))

    budget = Layers(0.4)
    dense = budget.measure(net, None)
    assert budget.at(dense, 1.0) == pytest.approx(2.0)
    assert sum(budget.tensor_costs(net, EXAMPLE).values()) == pytest.approx(dense)
    require_reducible("StructuredPruning", budget, "channels")
    with pytest.raises(ValueError, match=r"`Layers\(remaining=40\)`: expected 0 < remaining <= 1"):
        Layers(40)


@pytest.mark.parametrize(
    ("budget", "by", "instead"),
    [
        (Sparsity(0.5), "channels", "WeightPruning"),
        (Channels(0.5), "factors", "StructuredPruning"),
        (MACs(0.5), "masks", "StructuredPruning.*LowRankFactorization"),
    ],
)
def test_a_budget_that_a_method_cannot_reach_is_refused(budget: Budget, by, instead: str) -> None:
    with pytest.raises(ValueError, match=rf"`Method\(.*\)`: expected a budget that .* can reach.*Use .*{instead}"):
        require_reducible("Method", budget, by)
