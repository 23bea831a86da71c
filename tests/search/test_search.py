"""`lightning_light.search` on small networks: budgets met, exactness, resume, and what it refuses."""

import copy
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_light as ll
from lightning_light.measure import count_cost
from lightning_light.search import BlockChoices, search
from lightning_light.search.evaluation import Evaluator
from lightning_light.surgery import manifest_of, restructure

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    net = nn.Sequential(*stem, Block(16), Block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        for _ in range(5):
            net(torch.randn(32, 3, 8, 8))  # statistics that fit
    return net.eval()


def batches(count: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 32, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def costs(net: nn.Module) -> tuple[int, int]:
    cost = count_cost(net, (EXAMPLE,))
    return cost.macs, cost.params


def run(net: nn.Module, budget: Any, **options: Any) -> Any:
    given = {"data": batches(), "calibration_batches": 2, "evaluation_batches": 2, "evaluations": 2, **options}
    return search(net, EXAMPLE, budget, **given)


def test_two_budgets_are_met_in_place_and_the_edits_are_replayed() -> None:
    net, plain = network(), network()
    result = run(net, [ll.MACs(0.5), ll.Params(0.6)])
    macs, params = costs(net)
    dense_macs, dense_params = costs(plain)
    assert macs <= 0.5 * dense_macs
    assert params <= 0.6 * dense_params
    assert (macs, params) == (result.measured["macs"], result.measured["params"])
    assert {item.name for item in result.items} <= {item.name for item in result.table.items}
    rebuilt = restructure(network(), net.state_dict(), manifest_of(net))
    assert torch.equal(rebuilt.eval()(batches()[0]), net(batches()[0]))


def test_a_budget_that_is_met_changes_nothing_and_a_dry_run_neither() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    assert run(net, ll.MACs(1.0)).items == ()
    assert len(run(net, ll.MACs(0.5), dry_run=True).items) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_without_evaluations_the_sum_of_distances_is_the_least_of_all_feasible_sets() -> None:
    """Blocks alone: each saves the same, so the best set is known by enumeration."""
    net = nn.Sequential(*network()[:3], *[Block(16) for _ in range(4)], *network()[5:]).eval()
    result = run(net, ll.MACs(0.6), space=[BlockChoices()], evaluations=0, dry_run=True)
    table = result.table
    sets = [
        chosen
        for size in range(5)
        for chosen in itertools.combinations(table.items, size)
        if table.costs["macs"] - sum(table.savings[item.name]["macs"] for item in chosen) <= result.goals["macs"]
    ]
    best = min(sets, key=lambda chosen: sum(table.distances[item.name] for item in chosen))
    assert set(result.items) in [set(best)] or result.score.loss <= 1e-9 + _loss(net, best)
    assert len(result.items) == 2


def _loss(net: nn.Module, items: Any) -> float:
    evaluator = Evaluator(net, ll.search.functional.ExampleInput.of(EXAMPLE), [BlockChoices()], *_parts())
    return evaluator.score(evaluator.changed(items)).loss


def _parts() -> Any:
    calls = [ll.search.functional.ExampleInput.of(batch) for batch in batches()]
    return calls[:2], calls[2:]
