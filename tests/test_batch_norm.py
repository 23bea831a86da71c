"""Correction of batch-norm statistics: measured per batch, moved by the difference, exact for an unchanged network."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_light.batch_norm import InputRecorder, has_statistics, measure_statistics, move_statistics
from lightning_light.dependency import trace_dependencies
from lightning_light.example_input import ExampleInput
from lightning_light.surgery.edit import cut
from tests.zoo import ZOO, noise


def trained(name: str = "plain") -> Any:
    """A network whose running statistics are those of a few batches."""
    torch.manual_seed(0)
    net = ZOO[name]().train()
    for seed in range(60):
        net(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    return net


def inputs(count: int = 3, samples: int = 16) -> list[ExampleInput]:
    return [
        ExampleInput((torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(100 + i)),))
        for i in range(count)
    ]


def test_statistics_are_means_over_batches() -> None:
    layer = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    batches = [torch.randn(8, 3) * 3 + 1 for _ in range(4)]
    found = measure_statistics(layer, [ExampleInput((batch,)) for batch in batches])
    assert list(found) == ["0"]
    torch.testing.assert_close(found["0"].mean, torch.stack([batch.mean(0) for batch in batches]).mean(0))
    variances = torch.stack([batch.var(0, correction=0) for batch in batches])
    torch.testing.assert_close(found["0"].var, variances.mean(0))


def test_later_layers_see_inputs_normalized_as_in_training() -> None:
    net, call = trained(), inputs(1)[0]
    expected = net.conv2(net.bn1.train()(net.conv1(call.args[0])).relu())
    found = measure_statistics(trained(), [call])
    torch.testing.assert_close(found["bn2"].mean, expected.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_network_as_it_was(training) -> None:
    net = trained().train(training)
    before = copy.deepcopy(net.state_dict())
    measure_statistics(net, inputs())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training is training
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_an_unchanged_network_keeps_exactly_its_statistics() -> None:
    net = trained()
    before = copy.deepcopy(net.state_dict())
    move_statistics(net, measure_statistics(net, inputs()), measure_statistics(net, inputs()), {})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_statistics_after_a_cut_fit_the_smaller_network() -> None:
    """After channels of `conv1` are removed, the inputs of `bn2` change; the moved statistics are closer."""
    net = trained()
    graph = trace_dependencies(net, (noise(2, 3, 8, 8),))
    keep = {"conv1": torch.tensor([False] * 4 + [True] * 4)}
    kept = graph.kept_positions(keep)
    before = measure_statistics(net, inputs())
    cut(net, kept, attributes=graph.attributes(net, keep))
    stale = net.bn2.running_mean.clone(), net.bn2.running_var.clone()
    move_statistics(net, before, measure_statistics(net, inputs()), kept)
    true = measure_statistics(net, inputs(20))["bn2"]
    assert (net.bn2.running_mean - true.mean).norm() < (stale[0] - true.mean).norm() / 2
    assert (net.bn2.running_var / true.var).log().norm() < (stale[1] / true.var).log().norm() / 2


def test_recorder_keeps_the_first_samples_of_the_first_call_per_batch() -> None:
    net = trained()
    recorder = InputRecorder(net)
    net(noise(40, 3, 8, 8))
    assert not recorder.take(), "not active"
    recorder.active = True
    x = noise(40, 3, 8, 8)
    net(x)
    net(x + 1)
    (call,) = recorder.take()
    samples = len(call["args"][0])
    assert 2 <= samples < 40
    assert torch.equal(call["args"][0], x[:samples])
    net.eval()(x)
    assert not recorder.take(), "only calls in training count"
    recorder.remove()
    assert not net._forward_pre_hooks


def test_layers_with_statistics_are_found() -> None:
    assert has_statistics(ZOO["plain"]())
    assert not has_statistics(ZOO["batch_norm_free"]())
