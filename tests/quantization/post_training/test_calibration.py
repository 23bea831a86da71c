"""Wrong calibration data and arguments: refused by a sentence, and the network is as before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_light.errors import LightningLightError, UnsupportedError
from lightning_light.quantization import (
    LSQ,
    PACT,
    AdaRound,
    Int8,
    IntN,
    MSEObserver,
    Percentile,
    fake_quantized,
    measure_sensitivity,
    quantize,
)
from lightning_light.surgery.attachment import has_state
from tests.zoo import ZOO, noise

X = noise(2, 3, 8, 8)


def with_one(value: float) -> Tensor:
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


BATCHES: dict[str, tuple[Any, type[Exception], str]] = {
    "another name": ([{"image": X}], ValueError, r"as image stops it: TypeError: .* dict holds keyword"),
    "an array": ([X.numpy()], ValueError, "expected batches of tensors, found ndarray"),
    "nothing": ([None], ValueError, "expected batches of tensors, found NoneType"),
    "integers": ([X.int()], ValueError, r"\(2, 3, 8, 8\) torch.int32 stops it: RuntimeError"),
    "too few channels": ([X[:, :2]], ValueError, r"\(2, 2, 8, 8\) torch.float32 stops it"),
    "a later batch": ([X, X[:, :2]], ValueError, r"\(2, 2, 8, 8\) torch.float32 stops it"),
    "no sample": ([X, X[:0]], ValueError, r"a sample in each batch, found a batch of \(0, 3, 8, 8\)"),
    "exhausted": (iter(()), ValueError, "found no batch; a generator gives its batches only once"),
    "not a number": (
        [X, with_one(torch.nan)],
        ValueError,
        r"finite values, found others in batch 1, at `conv1`",
    ),
    "infinity": ([with_one(torch.inf)], ValueError, "finite values, found others in batch 0"),
}


@pytest.mark.parametrize(
    "options", [{}, {"equalize": True, "correct_bias": True, "rounding": AdaRound(steps=2)}], ids=str
)
@pytest.mark.parametrize("name", BATCHES)
def test_wrong_batches(name, options) -> None:
    batches, kind, message = BATCHES[name]
    net = ZOO["plain"]().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(kind, match=message):
        quantize(net, None, Int8(), data=iter(()) if name == "exhausted" else batches, **options)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in net.modules())
    assert not has_state(net)


@pytest.mark.parametrize("recipe", [Int8(observer=MSEObserver()), Int8(observer=Percentile()), LSQ(), PACT()], ids=str)
def test_every_observer_sees_what_is_no_number(recipe) -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="expected finite values"):
            quantize(ZOO["plain"](), with_one(value), recipe)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: quantize(nn.ReLU(), X, Int8()), ValueError, "no convolution or linear layer that can be; .*none"),
        (
            lambda: quantize(ZOO["plain"](), X, Int8(exclude="*")),
            ValueError,
            "by the recipe.*or exclude fewer",
        ),
        (lambda: measure_sensitivity(ZOO["plain"](), with_one(torch.nan)), ValueError, "outputs, found .* batch 0"),
        (lambda: measure_sensitivity(ZOO["plain"](), X[:, 1:]), ValueError, r"`measure_sensitivity\(.*stops it"),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], kind, message) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_unbatched_inputs_are_fine() -> None:
    net = quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), X[0], Int8())
    with fake_quantized(net):
        assert net(X[0]).unique().numel() <= 256


def test_a_fake_quantized_network_is_refused() -> None:
    net = quantize(ZOO["plain"]().eval(), X, Int8())
    with (
        fake_quantized(net),
        pytest.raises(UnsupportedError, match=r"a float network.*Leave `fake_quantized`"),
    ):
        quantize(net, X, IntN(4, 8))
    with (
        pytest.raises(LightningLightError, match=r"`quantize` was called on, .*not a part of it"),
        fake_quantized(net.fc),
    ):
        pass


def test_a_module_that_is_compiled_in_place_is_quantized_and_stays_compiled() -> None:
    net = ZOO["plain"]().eval()
    with torch.no_grad():
        right = net(X)
        graphs: list[int] = []
        net.compile(backend=lambda graph, _: graphs.append(1) or graph.forward)
        quantize(net, X, Int8())
        with fake_quantized(net):
            quantized = net(X)
        assert not graphs
        assert not torch.equal(quantized, right)
        assert torch.equal(net(X), right)
    assert graphs


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_part_keeps_its_statistics_and_its_mode() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(4), nn.Dropout()))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), scripted, nn.Conv2d(4, 4, 3)).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    quantize(net, X, Int8())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
