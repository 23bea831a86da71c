"""The options of `quantize`: what they win, what they leave alone, and that a failure leaves no trace."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_light.errors import NoEffectWarning
from lightning_light.quantization import LSQ, AdaRound, Binary, IntN, fake_quantized, quantize
from lightning_light.quantization.fake_quantize import quantize_weight
from lightning_light.quantization.learned_qparams import weight_scale
from lightning_light.quantization.op_calls import OpId
from lightning_light.quantization.specs import WeightSpec
from lightning_light.surgery.attachment import state_of
from tests.quantization.post_training.test_equalization import MobileBlocks, trained
from tests.zoo import ZOO, noise

IMAGES = [noise(2, 3, 8, 8) * factor for factor in (1.0, 0.7, 1.3)]
QUICK = AdaRound(steps=100, learning_rate=0.05)


def residual() -> nn.Module:
    return trained(ZOO["residual"]())


def mobile_blocks() -> nn.Module:
    return trained(MobileBlocks())


def transposed() -> nn.Module:
    return trained(ZOO["transposed"]())


@torch.no_grad()
def outputs(net: nn.Module) -> Tensor:
    return torch.cat([net(x) for x in IMAGES])


def quantized_outputs(net: nn.Module, recipe: Any, **options: Any) -> Tensor:
    net = quantize(copy.deepcopy(net), None, recipe, data=IMAGES, **options)
    with fake_quantized(net):
        return outputs(net)


def error(net: nn.Module, recipe: Any, **options: Any) -> float:
    right = outputs(net)
    return float((quantized_outputs(net, recipe, **options) - right).square().sum() / right.square().sum())


def test_corrected_biases_put_every_channels_mean_right() -> None:
    """``E[y] - E[y_quantized]`` of each output channel is 0 on the calibration batches, also after other layers."""
    net, recipe = residual(), IntN(weights=3, activations=None)
    right = outputs(net).mean(0)
    off = (quantized_outputs(net, recipe).mean(0) - right).abs()
    corrected = (quantized_outputs(net, recipe, correct_bias=True).mean(0) - right).abs()
    assert off.max() > 0.1
    assert corrected.max() < 1e-4


def test_the_correction_is_the_papers_formula() -> None:
    """One layer without and one with a batch norm: the bias gets ``E[W x] - E[W~ x]``, times the norm's gain."""
    conv, bn = nn.Conv2d(3, 4, 3).double(), trained(nn.Sequential(nn.BatchNorm2d(4)))[0].double()  # type: ignore[arg-type, index]
    images = noise(4, 3, 8, 8).double()
    step = conv.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 3
    moved = torch.conv2d(images, conv.weight.detach() - (conv.weight.detach() / step).round() * step).mean((0, 2, 3))
    gain = bn.weight.detach() / (bn.running_var + bn.eps).sqrt()
    for net, changed, right in (
        (nn.Sequential(copy.deepcopy(conv)), "0.bias", conv.bias.detach() + moved),  # type: ignore[union-attr]
        (nn.Sequential(copy.deepcopy(conv), copy.deepcopy(bn)), "1.bias", bn.bias.detach() + gain * moved),
    ):
        before = {name: value.clone() for name, value in net.state_dict().items()}
        quantize(net, images, IntN(weights=3, activations=None), correct_bias=True)
        after = net.state_dict()
        torch.testing.assert_close(after[changed], right, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(after[name], before[name]) for name in before if name != changed)


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.parametrize("make", [mobile_blocks, transposed])
def test_learned_rounding_is_better_than_nearest(make, activations) -> None:
    recipe, net = IntN(weights=3, activations=activations), make()
    assert error(net, recipe, rounding=QUICK) < 0.7 * error(net, recipe)


def test_learned_weights_lie_on_the_grid_that_was_there() -> None:
    net = residual()
    found = quantize(copy.deepcopy(net), None, IntN(weights=4), data=IMAGES, rounding=QUICK)
    changed = 0
    for name, before in net.named_parameters():
        after = found.get_parameter(name)
        if before.dim() < 2:
            assert torch.equal(before, after)
            continue
        (q, step), (_, step_before) = (quantize_weight(w, WeightSpec(4, -7, 7)) for w in (after, before))
        columns = step.reshape(-1, *[1] * (before.dim() - 1))
        assert torch.equal(step, step_before)
        assert torch.where(q.abs() == 7, 0.0, after - q * columns).abs().max() == 0
        changed += int((q != quantize_weight(before, WeightSpec(4, -7, 7))[0]).sum())
    assert changed > 20


def test_equalizing_helps_where_channels_are_far_apart_and_share_a_scale() -> None:
    net, recipe = trained(MobileBlocks()), IntN(weights=8, per_channel=False)
    net.depthwise.weight.data *= torch.logspace(-1.5, 1.5, 8).reshape(8, 1, 1, 1)
    assert error(net, recipe, equalize=True) < 0.5 * error(net, recipe)


def test_the_same_seed_gives_the_same_network_and_leaves_randomness_alone() -> None:
    net, state = residual(), torch.get_rng_state()
    settings = {"rounding": AdaRound(steps=10), "correct_bias": True, "equalize": True}
    with pytest.warns(NoEffectWarning, match="no two layers in a row"):
        first, second = (quantize(copy.deepcopy(net), None, IntN(), data=iter(IMAGES), **settings) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(state, torch.get_rng_state())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in first.parameters())


class Fragile(nn.Module):
    """Breaks at a given call."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.net, self.at, self.calls = trained(MobileBlocks()), at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("broken")
        return self.net(x)


@pytest.mark.parametrize("at", [1, 4, 9, 16])
def test_a_failure_at_any_time_leaves_the_module_as_it_was(at) -> None:
    net = Fragile(at).train()
    net.net.bn1.eval()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    with pytest.raises((RuntimeError, ValueError), match="broken"):
        quantize(net, None, IntN(), data=IMAGES, equalize=True, correct_bias=True, rounding=AdaRound(steps=10))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not state_of(net).state


def test_layers_that_an_option_cannot_help_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied, self.fc = nn.Linear(6, 6, bias=False), parametrizations.weight_norm(nn.Linear(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.tied(F.relu(self.tied(x)))))

    with pytest.warns(NoEffectWarning) as caught:
        quantize(Odd(), noise(8, 6), IntN(), correct_bias=True, rounding=AdaRound(steps=10))
    nearest, uncorrected = sorted(str(warning.message) for warning in caught)
    assert "correct_bias=True" in nearest
    assert "['tied']" in nearest
    assert "rounding=AdaRound" in uncorrected
    assert "['tied', 'fc']" in uncorrected
    with pytest.warns(NoEffectWarning, match="rounding=AdaRound"):
        quantize(residual(), None, Binary(), data=IMAGES, rounding=AdaRound(steps=10))


def test_step_sizes_that_training_learns_begin_with_the_learned_rounding() -> None:
    net = residual()
    quantize(net, None, LSQ(weights=4, activations=8), data=IMAGES, rounding=AdaRound(steps=10))
    state = state_of(net).state["quantization_aware_training"]
    weight = net.get_submodule("conv2").weight
    step = state["learned"][weight_scale(OpId("conv2", 1, "conv2d", 1))]
    torch.testing.assert_close(step, weight.detach().abs().amax((1, 2, 3)) / 7)
    q = weight.detach() / step.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(q, q.round(), atol=1e-5, rtol=0)


def test_a_bias_before_a_batch_norm_without_one_is_corrected_in_its_own_units() -> None:
    """``b + (E[y] - E[y_quantized]) / g``, ``g = 1 / sqrt(var + eps)``: Nagel et al. (2019), section 4.2."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)).eval()
    net[1].running_var.copy_(torch.tensor([0.01, 1.0, 9.0, 0.25]))  # type: ignore[operator, union-attr]
    bias, right = net[0].bias.detach().double().clone(), outputs(net).double().mean((0, 2, 3))  # type: ignore[union-attr, operator]
    recipe = IntN(weights=2, activations=None)
    with fake_quantized(quantize(copy.deepcopy(net), None, recipe, data=IMAGES)) as plain:
        off = right - outputs(plain).double().mean((0, 2, 3))
    assert off.abs().min() > 1e-3
    corrected = quantize(net, None, recipe, data=IMAGES, correct_bias=True)
    expected = bias + off * torch.tensor([0.01, 1.0, 9.0, 0.25], dtype=torch.float64).add(1e-5).sqrt()
    torch.testing.assert_close(net[0].bias.detach().double(), expected, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr, operator]
    with fake_quantized(corrected):
        torch.testing.assert_close(outputs(corrected).double().mean((0, 2, 3)), right, rtol=1e-4, atol=1e-4)
