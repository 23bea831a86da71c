"""A fake-quantized module is one function: with and without gradients, in every layer that a hook looks at."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_light.quantization import (
    LSQ,
    PACT,
    DynamicObserver,
    Int8,
    IntN,
    MixedPrecision,
    Recipe,
    Ternary,
    fake_quantized,
    quantize,
)
from tests.zoo import ZOO

RECIPES: list[Recipe] = [
    Int8(),
    Int8(engine="x86"),
    IntN(4, 4),
    LSQ(8, 8),
    LSQ(4, 4, offset=True),
    PACT(4, 8),
    Ternary(),
    MixedPrecision(default=LSQ(), first=Int8(), last=Int8()),
]


def outputs_of_layers(net: nn.Module, *args: Any, **kwargs: Any) -> dict[str, list[Tensor]]:
    """What forward hooks of the user's on all leaf modules see."""
    seen: dict[str, list[Tensor]] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            leaves = tree_leaves(output)
            seen.setdefault(name, []).extend(leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor))

        return hook

    handles = [
        module.register_forward_hook(look(name)) for name, module in net.named_modules() if not list(module.children())
    ]
    net(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def calibrated(name: str, recipe: Recipe) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    net = ZOO[name]().eval()
    args, kwargs = net.example
    quantize(net, dict(inspect.signature(net.forward).bind(*args, **kwargs).arguments), recipe)
    return net, args, kwargs


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
@pytest.mark.parametrize("name", ["plain", "squeeze_excite", "attention"])
def test_outputs_with_and_without_gradients_are_equal_bit_for_bit(name, recipe) -> None:
    net, args, kwargs = calibrated(name, recipe)
    with fake_quantized(net):
        with_gradients = outputs_of_layers(net, *args, **kwargs)
        with torch.no_grad():
            without = outputs_of_layers(net, *args, **kwargs)
    assert with_gradients.keys() == without.keys()
    for layer, found in without.items():
        assert all(map(torch.equal, with_gradients[layer], found)), layer


class Branches(nn.Module):
    """Operators in place, or not, on the outputs of layers, sums and pooling, as torchvision and timm write them."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.drop, self.head, self.inplace = nn.Dropout(0.5, inplace), nn.Linear(6, 4), inplace

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.first(x), self.inplace)
        y = self.second(x)
        if self.inplace:
            y += x
            y.mul_(1.5)
        else:
            y = (y + x) * 1.5
        return self.head(self.drop(nn.functional.leaky_relu(y, 0.1, self.inplace).mean((2, 3))))


@pytest.mark.parametrize("recipe", [*RECIPES, IntN(8, 8, observer=DynamicObserver())], ids=repr)
def test_operators_in_place_are_trained_like_others(recipe) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net, x = Branches(inplace), torch.randn(2, 3, 8, 8)
        quantize(net.eval(), x, recipe)
        with fake_quantized(net.train()):
            torch.manual_seed(1)
            net(x).square().mean().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    assert all(map(torch.equal, *found))
    assert all(bool(gradient.any()) for gradient in found[0])


@pytest.mark.parametrize("name", list(ZOO))
def test_hooks_see_the_outputs_of_the_float_network_up_to_the_quantization_error(name) -> None:
    net, args, kwargs = calibrated(name, Int8())
    plain = outputs_of_layers(net, *args, **kwargs)
    with fake_quantized(net), torch.no_grad():
        quantized = outputs_of_layers(net, *args, **kwargs)
    assert plain.keys() == quantized.keys()
    for layer, right in plain.items():
        for before, after in zip(right, quantized[layer], strict=True):
            if before.is_floating_point():
                error, size = (before - after).norm(), before.norm()
                assert float(error) <= 0.1 * float(size), layer


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_training_mode_computes_the_same_function(recipe) -> None:
    """Of a network without batch norm and dropout."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    images = torch.randn(4, 3, 8, 8)
    quantize(net, images, recipe)
    with fake_quantized(net):
        assert torch.equal(net.train()(images), net.eval()(images))
