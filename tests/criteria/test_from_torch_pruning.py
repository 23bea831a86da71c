"""An importance of torch-pruning scores the groups that we find as torch-pruning scores its own."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import function

from lightning_light.criteria import Gathered, Magnitude, collect_evidence
from lightning_light.criteria.evidence import Evidence
from lightning_light.criteria.group_criterion import GroupCriterion
from lightning_light.criteria.torch_pruning import FromTorchPruning
from lightning_light.dependency import ChannelGroup, trace_dependencies
from lightning_light.errors import UnsupportedError
from tests.zoo import ZOO

NETS = ["batch_norm_free", "concat", "depthwise", "plain", "prelu", "reshape_flatten", "residual", "transposed", "unet"]


class OutputNorm(tp.importance.Importance):
    """A user's own: the L1 norm of what makes the channels, minus a little for later ones."""

    def __call__(self, group: Any) -> Tensor:
        scores = torch.zeros(len(group[0].idxs))
        for dep, idxs in group:
            if dep.handler in (function.prune_conv_out_channels, function.prune_linear_out_channels):
                transposed = getattr(dep.layer, "transposed", False)
                weight = dep.layer.weight.transpose(0, 1) if transposed else dep.layer.weight
                scores += weight.detach()[idxs].flatten(1).abs().sum(1)
        return scores - torch.arange(len(scores)) * 1e-3


class MySquares(tp.importance.GroupTaylorImportance):
    """A user's own kind of Taylor, with another default."""

    def __init__(self, group_reduction: str = "max") -> None:
        super().__init__(group_reduction=group_reduction, normalizer=None)


IMPORTANCES = [
    tp.importance.GroupMagnitudeImportance(p=1),
    tp.importance.GroupMagnitudeImportance(p=2, group_reduction="max", bias=True),
    tp.importance.MagnitudeImportance(p=2, group_reduction="first", normalizer=None),
    tp.importance.LAMPImportance(),
    tp.importance.FPGMImportance(),
    tp.importance.RandomImportance(),
    tp.importance.BNScaleImportance(),
    tp.importance.GroupTaylorImportance(),
    tp.importance.TaylorImportance(group_reduction="sum"),
    tp.importance.GroupHessianImportance(),
    tp.importance.HessianImportance(normalizer=None),
    MySquares(),
    OutputNorm(),
]
WITH_DATA = {"OBDCImportance", "ActivationImportance"}  # keep statistics of their own in the user's modules


def test_every_importance_is_compared() -> None:
    shipped = {
        name
        for name, value in vars(tp.importance).items()
        if inspect.isclass(value) and issubclass(value, tp.importance.Importance)
    }
    compared = {type(importance).__name__ for importance in IMPORTANCES} - {"MySquares", "OutputNorm"}
    assert shipped - {"Importance"} - WITH_DATA == compared


def randomized(name: str) -> Any:
    net = ZOO[name]().eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return net


def gathered(net: Any, criterion: FromTorchPruning) -> Gathered:
    needs = criterion.needs - {"generator"}
    if not needs:
        return Gathered()
    (example,), _ = net.example
    data = [(torch.randn_like(example),) for _ in range(2)]
    return collect_evidence(net, data, needs, batches=2, loss=lambda output, batch: output.square().sum())


def theirs(net: nn.Module, group: ChannelGroup, importance: Any, evidence: dict[str, Tensor]) -> Tensor | None:
    """torch-pruning's scores, by the first position of each channel in the layer that makes it."""
    copied, args = copy.deepcopy(net), net.example[0]  # type: ignore[union-attr, index]
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(copied, args)
    for name, parameter in copied.named_parameters():
        parameter.grad = evidence[name].clone() if name in evidence else None
    maker = next(member for member in group.members if member.role == "out")
    module = copied.get_submodule(maker.tensor.rpartition(".")[0])
    positions = maker.index.reshape(-1).sort().values.tolist()
    found = graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, idxs=positions)
    torch.manual_seed(0)
    scores = importance(found)
    return None if scores is None else scores[torch.tensor(positions).argsort()][maker.index[:, 0].argsort().argsort()]


@pytest.mark.filterwarnings("ignore")  # torch-pruning's own
@pytest.mark.parametrize("importance", IMPORTANCES, ids=lambda importance: type(importance).__name__)
@pytest.mark.parametrize("name", NETS)
def test_the_same_scores_as_torch_pruning(name: str, importance: Any) -> None:
    net = randomized(name)
    criterion = FromTorchPruning(importance)
    graph, found, compared = trace_dependencies(net, *net.example), gathered(net, criterion), 0
    evidence = next((dict(found.tensors[kind]) for kind in ("grad", "grad_squared") if kind in found.tensors), {})
    before = copy.deepcopy(net.state_dict())
    for group in graph.groups:
        maker = next((m for m in group.members if m.role == "out"), None)
        whole = maker is not None and maker.index.numel() == graph.shapes[maker.tensor][maker.dim]
        if group.reason is not None or not whole or maker.index.shape[1] > 1:
            continue
        mine, expected = criterion.score_group(net, group, found), theirs(net, group, importance, evidence)
        assert (mine is None) == (expected is None), group.name
        if mine is not None:
            assert torch.allclose(mine, expected, rtol=1e-4), group.name
            assert torch.equal(mine.argsort(), expected.argsort()), group.name
        compared += 1
    assert compared
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("criterion", "needs"),
    [
        (FromTorchPruning(tp.importance.MagnitudeImportance()), set()),
        (FromTorchPruning(tp.importance.TaylorImportance()), {"grad"}),
        (FromTorchPruning(MySquares()), {"grad"}),
        (FromTorchPruning(tp.importance.HessianImportance()), {"grad_squared"}),
        (FromTorchPruning(OutputNorm(), gradients="squared"), {"grad_squared"}),
        (FromTorchPruning(MySquares(), gradients="none"), set()),
    ],
    ids=repr,
)
def test_needs_depend_on_the_importance(criterion: FromTorchPruning, needs: set[str]) -> None:
    assert criterion.needs - {"generator"} == needs


def test_random_scores_follow_the_generator_and_leave_global_state() -> None:
    net = randomized("plain")
    (group, *_) = [g for g in trace_dependencies(net, *net.example).groups if g.reason is None]
    criterion, state = FromTorchPruning(tp.importance.RandomImportance()), torch.get_rng_state()

    def scores(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        found = criterion.score_group(net, group, Gathered(), generator=generator)
        assert found is not None
        return found

    assert torch.equal(scores(1), scores(1))
    assert not torch.equal(scores(1), scores(2))
    assert torch.equal(scores(None), scores(None))
    assert torch.equal(state, torch.get_rng_state())


def test_repr_is_the_call() -> None:
    criterion = FromTorchPruning(tp.importance.GroupMagnitudeImportance(p=1, normalizer=None), seed=3)
    assert repr(criterion) == "FromTorchPruning(GroupMagnitudeImportance(p=1, normalizer=None), seed=3)"
    names = {**vars(tp.importance), "FromTorchPruning": FromTorchPruning}
    assert repr(eval(repr(criterion), names)) == repr(criterion)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [(tp.importance.MagnitudeImportance, "found a class"), ("l1", "found str"), (Magnitude(), "found Magnitude")],
)
def test_other_things_are_refused(value: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        FromTorchPruning(value)


def test_impossible_uses_are_refused() -> None:
    importance = tp.importance.MagnitudeImportance(group_reduction=None, normalizer=None)
    with pytest.raises(ValueError, match="gradients='all'"):
        FromTorchPruning(importance, gradients="all")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="expected a dependency group"):
        FromTorchPruning(importance)(Evidence(torch.ones(2)))
    net = randomized("plain")
    (group, *_) = [g for g in trace_dependencies(net, *net.example).groups if g.reason is None]
    with pytest.raises(ValueError, match=f"expected one score per channel, shape .{group.width}"):
        FromTorchPruning(importance).score_group(net, group, Gathered())
    assert issubclass(FromTorchPruning, GroupCriterion)
