"""Learned gates: closed gates equal removed channels, the budget is met at every step, planted channels are found."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.budgets import Channels, MACs, Params, Size, Sparsity
from lightning_light.criteria import LearnedGates
from lightning_light.criteria.gated_weights import GatedWeights, ungated_writers
from lightning_light.criteria.learned_gates import solved_gates
from lightning_light.criteria.output_distance import output_distance
from lightning_light.dependency import trace_dependencies
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated, plain_attention
from lightning_light.nested import tensors_in
from lightning_light.sparsity import WeightPruning
from lightning_light.structured import Local, StructuredPruning, prune_channels
from lightning_light.surgery.edit import cut
from tests.contract.bodies import Body, module_class
from tests.contract.runs import DEFAULT_HOST, trainer
from tests.dependency.test_zoo import ROWS
from tests.zoo import ZOO, Net, noise

ATTENTION = {"attention": 2e-3, "encoder": 1e-2, "fused_qkv": 1e-2}  # a smaller head size has another temperature


def built(name: str) -> Net:
    torch.manual_seed(0)
    return ZOO[name]().eval()


@pytest.mark.parametrize(("name", "heads"), ROWS)
def test_closed_gates_compute_what_the_network_without_the_channels_computes(name, heads) -> None:
    net, small, generator = built(name), built(name), torch.Generator().manual_seed(1)
    args, kwargs = net.example
    graph = trace_dependencies(net, args, kwargs, heads=heads)
    groups = [g for g in graph.groups if g.reason is None and g.width > 1 and any(m.role == "out" for m in g.members)]
    kept = {g.name: torch.rand(g.width, generator=generator) < 0.6 for g in groups}
    for mask in kept.values():
        mask[0] = True
    gated = GatedWeights(net, groups, ungated_writers(net, groups, ExampleInput(args, kwargs)))
    with isolated(net), plain_attention():
        found = gated.call(torch.cat([kept[g.name] for g in groups]).float(), ExampleInput(args, kwargs))
        plain = net(*args, **kwargs)
    cut(small, graph.kept_positions(kept), attributes=graph.attributes(small, kept))
    with isolated(small):
        expected = small(*args, **kwargs)
    tolerance = ATTENTION.get(name, 1e-6) if heads == "dim" else 1e-6
    for a, b, c in zip(tensors_in(found), tensors_in(expected), tensors_in(plain), strict=True):
        assert torch.allclose(a, b, atol=tolerance, rtol=1e-5)
        assert not torch.allclose(b, c, atol=10 * tolerance), "the channels matter"


@pytest.mark.parametrize(("floor", "width"), [(0.1, None), (1.5, 1.5)], ids=["free", "floor"])
def test_solved_gates_meet_the_budget_and_floors_and_their_gradient_is_that_of_differences(floor, width) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(2, 6, generator=generator, dtype=torch.double)
    logits[:2] -= 3.0
    owner, floors = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([floor, 0.1], dtype=torch.double)

    def cost(widths: Tensor) -> Tensor:
        return (widths * torch.tensor([2, 3])).sum() ** 2 / 16**2

    def solved(a: Tensor) -> Tensor:
        return solved_gates(a, owner, floors, cost, 0.4, 0.5)

    widths = torch.zeros_like(floors).index_add(0, owner, solved(logits))
    assert abs(float(cost(widths)) - 0.4) < 1e-9
    assert 0.7 < widths[0] < 0.8 if width is None else abs(float(widths[0]) - width) < 1e-9
    assert torch.autograd.gradcheck(lambda a: (solved(a) * weights).sum(), logits.clone().requires_grad_())


class Planted(nn.Module):
    """Half of the hidden channels have large weights and are read with zeros, the other half are read."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 3)
        with torch.no_grad():
            self.first.weight[::2] *= 10.0
            self.second.weight[:, ::2] *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x))).mean((2, 3))


class Batches:
    """The same two batches at every pass."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images in noise(16, 3, 8, 8).split(8):
            yield images, torch.zeros(8)


@pytest.mark.parametrize("budget", [MACs(0.5), Params(0.52), Channels(0.5), Size(2360)], ids=repr)
@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_channels_that_do_not_matter_are_removed_whatever_their_weights(budget, distance) -> None:
    net = Planted()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    options: dict[str, Any] = {"criterion": LearnedGates(20, distance=distance), "data": Batches()}
    plan = prune_channels(net, torch.zeros(2, 3, 8, 8), budget, **options, dry_run=True)
    assert plan.kept["first"].tolist() == [False, True] * 8
    assert plan.after <= budget.goal(plan.before)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in before.items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in net.parameters())
    again = prune_channels(net, torch.zeros(2, 3, 8, 8), budget, **options)
    assert torch.equal(again.kept["first"], plan.kept["first"]), "deterministic"


def test_what_cannot_work_is_refused() -> None:
    gates, example = LearnedGates(3), torch.zeros(2, 3, 8, 8)
    with pytest.raises(UnsupportedError, match=r"`WeightPruning\(criterion=LearnedGates.*scores whole channels"):
        WeightPruning(Sparsity(0.5), criterion=gates)
    with pytest.raises(UnsupportedError, match=r"`StructuredPruning\(.*ranking=Local.*Leave `ranking`"):
        StructuredPruning(MACs(0.5), criterion=gates, ranking=Local())
    with pytest.raises(UnsupportedError, match=r"`prune_channels\(.*remaining=.*targets=Targets"):
        prune_channels(Planted(), example, criterion=gates, remaining={"first": 0.5})
    with pytest.raises(ValueError, match=r"expected `data`, batches .*\['gates'\]"):
        prune_channels(Planted(), example, MACs(0.5), criterion=gates)
    with pytest.raises(ValueError, match=r"expected 3 batches in `data`.*found an iterator with 2"):
        prune_channels(Planted(), example, MACs(0.5), criterion=gates, data=iter(Batches()))
    with pytest.raises(UnsupportedError, match="floating-point tensors, found int"):
        output_distance(3, 3, "kl", -1)


class Inner(Body):
    """Its step calls the layers without ``self(...)``."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self.head(self.features(batch[0])), batch[1])


def test_a_step_without_a_call_of_the_module_is_refused() -> None:
    module = module_class(Inner, DEFAULT_HOST)()
    with pytest.raises(UnsupportedError, match=r"calls `self\(...\)` in `training_step`"):
        trainer(StructuredPruning(MACs(0.5), criterion=LearnedGates(2))).fit(module)
    assert module.features.conv1.out_channels == 16


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_gates_are_trained_under_other_precisions(precision) -> None:
    module = module_class(Body, DEFAULT_HOST)()
    run = trainer(StructuredPruning(MACs(0.5), criterion=LearnedGates(3)), precision=precision, max_epochs=2)
    run.fit(module)
    assert module.features.conv1.out_channels < 16
