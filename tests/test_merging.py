"""Blocks that merge themselves, in the manner of RepVGG, MobileOne, timm and YOLO."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_light.errors import ParityError, UnsupportedError
from lightning_light.merging import merge_blocks
from lightning_light.reparameterization import ACB, expand_branches, merge_branches


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution and the batch norm behind it."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class ConvNorm(nn.Sequential):
    """As in timm: a method that returns the layer that takes the block's place."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outputs))

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        kernel, bias = folded(self.c, self.bn)
        fused = nn.Conv2d(self.c.in_channels, self.c.out_channels, self.c.kernel_size, self.c.stride, self.c.padding)
        fused.weight.copy_(kernel)
        fused.bias.copy_(bias)
        return fused


class Deployable(nn.Module):
    """As in RepVGG: 3x3 and 1x1 until `switch_to_deploy`, which changes the block in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.dense, self.point = ConvNorm(inputs, outputs, 3, stride), ConvNorm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam"):
            return torch.relu(self.reparam(x))
        return torch.relu(self.dense(x) + self.point(x))

    def switch_to_deploy(self) -> None:
        if hasattr(self, "reparam"):
            return
        dense, point = self.dense.fuse(), self.point.fuse()
        dense.weight.data += nn.functional.pad(point.weight.data, (1, 1, 1, 1))
        dense.bias.data += point.bias.data
        self.reparam = dense
        del self.dense, self.point


class Reparameterizable(Deployable):
    """As in MobileOne: the method has another name."""

    def reparameterize(self) -> None:
        self.switch_to_deploy()


class ForwardFused(nn.Module):
    """As in YOLO: after `fuse_convs`, ``forward_fuse`` is the forward pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = ConvNorm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))

    def fuse_convs(self) -> None:
        if not hasattr(self, "conv"):
            self.conv = self.body.fuse()
            del self.body


class Network(nn.Module):
    """One block of each kind, one of them under two names, and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8)
        self.stages = nn.Sequential(Deployable(8, 8), Reparameterizable(8, 12, 2), ForwardFused(12))
        self.again = self.stages[0]
        self.plain = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[1](self.again(self.stages[0](self.stem(x))))
        return self.head(self.plain(self.stages[2](x)).mean((2, 3)))


def network() -> tuple[Network, Tensor]:
    torch.manual_seed(0)
    model, x = Network(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        for _ in range(5):
            model(x + torch.randn_like(x))
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval(), x


def test_blocks_of_every_protocol_are_merged_exactly() -> None:
    model, x = network()
    before = model(x)
    merging = merge_branches(model, x)
    assert merging.blocks == {
        "stem": "fuse",
        "stages.0": "switch_to_deploy",
        "stages.1": "reparameterize",
        "stages.2": "fuse_convs",
    }
    assert merging.error is not None
    assert merging.error <= 1e-5
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert not [name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert model.again is model.stages[0]


def test_a_second_merging_finds_nothing() -> None:
    model, x = network()
    merge_branches(model)
    assert merge_branches(model, x).blocks == {}


def test_modes_and_random_numbers_stay() -> None:
    model, _ = network()
    model.stages.train()
    state = torch.get_rng_state()
    merge_blocks(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.stages[0].training
    assert model.stages[0].reparam.training
    assert not model.stem.training
    assert not model.head.training


def test_convolutions_inside_such_blocks_are_not_expanded() -> None:
    model, x = network()
    plan = expand_branches(model, x, ACB())
    assert list(plan.layers) == ["plain"]
    assert plan.skipped["stages.0.dense.c"] == "part of `stages.0.dense`, which merges branches of its own"
    merging = merge_branches(model, x)
    assert merging.layers == ("plain",)
    assert len(merging.blocks) == 4


class Blend(nn.Module):
    """Its ``fuse`` is not about branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def fuse(self) -> None:
        self.conv = nn.Conv2d(3, 3, 1)


class Pair(Blend):
    """Its ``fuse`` needs arguments."""

    def fuse(self, left: Any, right: Any) -> Any:  # type: ignore[override]
        return left + right


def test_a_method_that_changes_the_function_is_refused_and_the_model_unchanged() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Blend(), nn.ReLU()), torch.randn(2, 3, 4, 4)
    before = model(x)
    with pytest.raises(ParityError, match=r"merge_branches\(Sequential, ...\).*a method `fuse`"):
        merge_branches(model, x)
    assert torch.equal(model(x), before)


def test_a_method_with_arguments_is_not_called() -> None:
    assert merge_blocks(nn.Sequential(Pair())) == {}


def test_a_model_that_would_be_replaced_itself_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Put it into another module"):
        merge_blocks(ConvNorm(3, 3))
