"""The same numbers as torch-pruning's importances, on a net with every kind of member."""

from typing import Any, get_args

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from lightning_light.criteria import (
    BatchNormScale,
    Criterion,
    Evidence,
    GeometricMedian,
    Hessian,
    Magnitude,
    Normalizer,
    Taylor,
    channel_scores,
    combine,
    normalize,
)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False))
    nn.init.normal_(net[1].weight)
    net(torch.randn(4, 3, 8, 8)).square().sum().backward()
    return net


def group(net: nn.Sequential) -> Any:
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=torch.randn(1, 3, 8, 8))
    return graph.get_pruning_group(net[0], tp.prune_conv_out_channels, idxs=list(range(8)))


def members(net: nn.Sequential) -> list[Evidence]:
    """The maker, its norm and the reader, channels first."""
    tensors = [(net[0].weight, "out", False), (net[1].weight, "norm", False), (net[3].weight, "in", True)]
    found = []
    for weight, role, turned in tensors:
        data, grad = weight.detach(), weight.grad
        if turned:
            data, grad = data.transpose(0, 1), grad.transpose(0, 1)
        found.append(Evidence(data, role, grad=grad, grad_squared=grad**2))
    return found


def ours(net: nn.Sequential, criterion: Criterion, reduction: Any, normalizer: Any = None, roles: Any = None) -> Tensor:
    read = [evidence for evidence in members(net) if evidence.role in (roles or criterion.roles)]
    return normalize(combine([channel_scores(criterion(evidence)) for evidence in read], reduction), normalizer)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "prod", "first"])
def test_magnitude(net: nn.Sequential, p: int, reduction: Any) -> None:
    theirs = tp.importance.GroupMagnitudeImportance(p=p, group_reduction=reduction, normalizer=None)(group(net))
    assert torch.allclose(ours(net, Magnitude(p=p), reduction), theirs, rtol=1e-5)


@pytest.mark.parametrize("normalizer", [None, *get_args(Normalizer)])
def test_normalizers(net: nn.Sequential, normalizer: Any) -> None:
    spelled = "standarization" if normalizer == "standardization" else normalizer
    theirs = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean", normalizer=spelled)(group(net))
    assert torch.allclose(ours(net, Magnitude(p=2.0), "mean", normalizer), theirs, rtol=1e-4, atol=1e-6)


def test_network_slimming(net: nn.Sequential) -> None:
    theirs = tp.importance.BNScaleImportance(normalizer=None)(group(net))
    assert torch.allclose(ours(net, BatchNormScale(), "mean"), theirs)


def test_geometric_median(net: nn.Sequential) -> None:
    """Theirs measures between powers of the weights (p=1 here, on positive weights) and counts readers too."""
    with torch.no_grad():
        net[0].weight.abs_()
        net[3].weight.abs_()
    theirs = tp.importance.FPGMImportance(p=1, group_reduction="mean", normalizer=None)(group(net))
    assert torch.allclose(ours(net, GeometricMedian(), "mean", roles={"out", "in"}), theirs, rtol=1e-4)


def test_first_order(net: nn.Sequential) -> None:
    """Theirs is |w * g|, where the paper and we square it, and passes over batch norms."""
    theirs = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)(group(net))
    roots = [channel_scores(Taylor()(evidence).sqrt()) for evidence in members(net) if evidence.role != "norm"]
    assert torch.allclose(combine(roots, "sum"), theirs, rtol=1e-4)


def test_second_order(net: nn.Sequential) -> None:
    """For one batch the Hessian criterion is half of Taylor's: the factor does not change the order."""
    assert torch.allclose(2 * ours(net, Hessian(), "sum"), ours(net, Taylor(), "sum"), rtol=1e-5)
