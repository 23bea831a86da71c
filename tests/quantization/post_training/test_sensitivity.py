"""The scan, against the same computed by hand; and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torchmetrics import MeanSquaredError

from lightning_light.quantization import BitBudget, IntN, Sensitivity, fake_quantized, measure_sensitivity, quantize
from lightning_light.quantization.checkpoint_state import read_state
from lightning_light.quantization.fake_quantize import fake_quantize_weight
from lightning_light.surgery.attachment import state_of
from tests.quantization.post_training.test_equalization import MobileBlocks, trained
from tests.zoo import ZOO, noise

IMAGES = [noise(2, 3, 8, 8), noise(2, 3, 8, 8) * 0.5]


def test_one_layer_at_a_time_is_quantized() -> None:
    net = trained(MobileBlocks()).train()
    before = copy.deepcopy(net.state_dict())
    scan = measure_sensitivity(net, data=iter(IMAGES), bits=(3, 8))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    assert list(scan.distances) == ["expand", "depthwise", "project", "grouped", "fc1", "fc2"]
    assert scan.weights["depthwise"] == 8 * 9
    assert scan.macs["expand"] == 2 * 8 * 3 * 64
    net.eval()
    for layer in ("depthwise", "fc2"):
        changed = copy.deepcopy(net)
        weight = changed.get_submodule(layer).weight
        weight.data = fake_quantize_weight(weight.data, IntN(weights=3).spec().weight)[0]
        found = []
        for x in IMAGES:
            with torch.no_grad():
                p, q = net(x).double().softmax(1), changed(x).double().softmax(1)
            found.append((p * (p.log() - q.log())).sum(1).mean())
        assert scan.distances[layer][3] == pytest.approx(float(sum(found)) / 2, rel=1e-6)
        assert scan.distances[layer][8] < scan.distances[layer][3]


def test_what_it_is_for() -> None:
    scan = measure_sensitivity(trained(ZOO["residual"]()), data=IMAGES, bits=(2, 8), distance="mse")
    worst = max(scan.distances, key=lambda layer: scan.distances[layer][2])
    assert scan.most_sensitive(1) == [worst]
    assert set(scan.most_sensitive(2, bits=8)) <= set(scan.distances)
    assert len(scan.rows()) == 2 * len(scan.distances)
    assert str(scan).splitlines()[0].split() == ["layer", "weights", "2", "bits", "8", "bits"]
    with pytest.raises(ValueError, match="bits that were measured, \\(2, 8\\)"):
        scan.most_sensitive(1, bits=4)


@pytest.mark.parametrize(
    ("net", "batches", "options", "sentence"),
    [
        (nn.Linear(3, 4), [], {}, "found no batch"),
        (nn.Sequential(nn.ReLU()), [noise(2, 3)], {}, "found 0 convolution or linear layers"),
        (nn.Sequential(nn.Linear(3, 1)), [noise(2, 3)], {}, "Write `distance='mse'`"),
        (
            nn.Sequential(nn.Linear(3, 4)),
            [noise(2, 3)],
            {"bits": (4, 11)},
            "of 2 <= value <= 8, found 11",
        ),
    ],
)
def test_what_it_refuses(net, batches, options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        measure_sensitivity(net, data=batches, **options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_from_the_scan_to_a_quantized_network(name) -> None:
    net = trained(ZOO[name]())
    batches = [net.example[0]]
    scan = measure_sensitivity(net, data=batches, bits=(2, 4, 8), distance="mse", progress_bar=False)
    budget = BitBudget(size=sum(scan.weights.values()) * 4 // 8)
    assert len(set(budget.solve(scan).values())) > 1
    quantize(net, None, budget.recipe(scan, IntN(activations=8)), data=batches)
    plan = read_state(state_of(net).state["quantization_aware_training"]).plan
    assert {op.module: site.weight.bits for op, site in plan.layers.items()} == budget.solve(scan)
    assert isinstance(scan, Sensitivity)


def test_a_metric_of_the_user_judges_the_layers() -> None:
    net, metric = trained(ZOO["plain"]()), MeanSquaredError()
    with torch.no_grad():
        batches = [(images, net(images)) for images in IMAGES]
    scan = measure_sensitivity(net, data=batches, bits=(2, 8), metric=metric, progress_bar=False)
    layer = scan.most_sensitive(1)[0]
    others = [one for one in scan.distances if one != layer]
    quantize(net, None, IntN(weights=2, activations=None, exclude=others), data=batches)
    with fake_quantized(net), torch.no_grad():
        errors = torch.cat([(net(images) - target).square().flatten() for images, target in batches])
    assert scan.distances[layer][2] == pytest.approx(float(errors.mean()))
    assert scan.distances[layer][2] > scan.distances[layer][8] > 0.0
    assert not metric.update_called
    with pytest.raises(ValueError, match=r"metric=MeanSquaredError.*batches `\(inputs, target\)`, found Tensor"):
        measure_sensitivity(net, data=IMAGES, metric=metric)
