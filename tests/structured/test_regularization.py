"""Regularizers: the penalty of every channel against its formula."""

from typing import Any

import pytest
import torch

from lightning_light.dependency import trace_dependencies
from lightning_light.structured import GroupLasso, GrowingRegularization
from lightning_light.structured.regularization import add_penalty, group_norms
from tests.zoo import ZOO, noise


def prepared() -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = ZOO["plain"]()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return net, [g for g in trace_dependencies(net, (noise(2, 3, 8, 8),)).groups if g.reason is None]


def expected_norms(net: Any) -> Any:
    squares = net.conv1.weight.square().sum((1, 2, 3)) + net.conv2.weight.square().sum((0, 2, 3))
    return (squares + net.bn1.weight.square()).sqrt().detach()


def test_norm_of_a_channel_counts_all_coupled_layers() -> None:
    net, groups = prepared()
    group = next(g for g in groups if g.name == "conv1")
    torch.testing.assert_close(group_norms(dict(net.named_parameters()), group), expected_norms(net))


def test_group_lasso_equals_its_formula() -> None:
    net, groups = prepared()
    norms = expected_norms(net)
    add_penalty(net, groups, GroupLasso(0.1, alpha=4.0), progress=0.3)
    factor = 0.1 * 2.0 ** (4.0 * (norms.max() - norms) / (norms.max() - norms.min()))
    torch.testing.assert_close(
        net.conv1.weight.grad, factor.reshape(-1, 1, 1, 1) * net.conv1.weight, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(net.bn1.weight.grad, factor * net.bn1.weight, rtol=1e-4, atol=1e-5)
    assert net.fc.bias.grad.eq(0).all(), "the output layer is not regularized"


def test_growing_regularization_equals_its_formula() -> None:
    net, groups = prepared()
    squares = expected_norms(net).square()
    add_penalty(net, groups, GrowingRegularization(0.1, growth=10.0), progress=0.25)
    factor = 0.1 * (1 + 10.0 * 0.25 * (squares.max() - squares) / (squares.max() - squares.min()))
    torch.testing.assert_close(net.conv1.weight.grad, factor.reshape(-1, 1, 1, 1) * net.conv1.weight)


def test_parameters_without_gradient_are_unchanged() -> None:
    net, groups = prepared()
    net.conv1.weight.grad = None
    add_penalty(net, groups, GroupLasso(0.1), progress=0.0)
    assert net.conv1.weight.grad is None


@pytest.mark.parametrize("kind", [GroupLasso, GrowingRegularization])
def test_negative_strength_is_refused(kind) -> None:
    with pytest.raises(ValueError, match=r"strength=-1.*expected a number >= 0"):
        kind(strength=-1.0)
