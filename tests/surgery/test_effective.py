"""Layers that have been replaced have the readable attributes of the layer, and refuse what would be lost."""

import copy
import re

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_light.budgets import MACs, Params
from lightning_light.errors import UnsupportedError
from lightning_light.lowrank import LowRankFactorization, RankRatio, factorize
from lightning_light.lowrank.build import build_factors, dense_weight
from lightning_light.lowrank.splitting import split_module
from lightning_light.reparameterization import ACB, Reparameterization, RepVGG, expand_branches
from lightning_light.schedules import OneShot
from lightning_light.surgery.effective import EffectiveTensor
from lightning_light.surgery.trial import failing_replacements
from tests.contract.runs import trainer
from tests.zoo import noise

CONV = nn.Conv2d(8, 12, (3, 5), stride=(1, 2), padding=(1, 2), groups=2)
LAYERS = {
    "linear": (nn.Linear(8, 6), (3,)),
    "embedding": (nn.Embedding(9, 6, padding_idx=2), (3,)),
    "channel": (CONV, (3,)),
    "spatial": (CONV, (3,)),
    "tucker2": (CONV, (2, 3)),
}
ATTRIBUTES = [
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("groups", "padding_mode", "num_embeddings", "embedding_dim", "padding_idx"),
]


def factors_of(form: str) -> nn.Module:
    layer, ranks = LAYERS[form]
    new = build_factors(layer, form, ranks)
    for inner in new:
        inner.weight = nn.Parameter(torch.randn(inner.weight.shape))
    return new


@pytest.mark.parametrize("form", list(LAYERS))
def test_factors_have_the_attributes_of_the_layer(form) -> None:
    layer, factors = LAYERS[form][0], factors_of(form)
    for name in ATTRIBUTES:
        assert getattr(factors, name, None) == getattr(layer, name, None), name
    assert factors.weight.shape == layer.weight.shape
    assert (factors.weight.dtype, factors.weight.device) == (torch.float32, torch.device("cpu"))
    torch.testing.assert_close(factors.weight + 0, dense_weight(factors).flatten(0, 1))
    kernel = factors.weight if factors.weight.ndim == 4 else None
    if kernel is not None:
        x = noise(2, 8, 9, 11)
        own = F.conv2d(x, factors.weight, factors.bias, layer.stride, layer.padding, groups=2)
        torch.testing.assert_close(own, factors(x), rtol=1e-4, atol=1e-4)


def test_a_product_with_the_weight_trains_the_factors() -> None:
    factors, x = factors_of("linear"), noise(4, 8)
    F.linear(x, factors.weight, factors.bias).square().sum().backward()
    found = {name: parameter.grad for name, parameter in factors.named_parameters()}
    factors.zero_grad()
    factors(x).square().sum().backward()
    for name, parameter in factors.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)  # sums in another order
    assert not isinstance(factors.weight, nn.Parameter)
    assert isinstance(factors.bias, EffectiveTensor)  # else code that collects parameters would find it twice


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.mul_(0.9),
        lambda layer: layer.weight.data.copy_(torch.zeros(6, 8)),
        lambda layer: layer.weight[:2].zero_(),
        lambda layer: layer.weight.detach().t().add_(1.0),
        lambda layer: nn.init.normal_(layer.weight),
        lambda layer: layer.weight.requires_grad_(False),
        lambda layer: torch.zeros(6, 8, out=layer.weight),
        lambda layer: setattr(layer.weight, "data", torch.zeros(6, 8)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(6, 8))),
        lambda layer: layer.bias.fill_(0.0),
    ],
)
def test_writes_that_would_be_lost_are_refused_by_name(write) -> None:
    factors = factors_of("linear")
    before = copy.deepcopy(factors.state_dict())
    with pytest.raises(UnsupportedError, match=r"`Factors.(weight|bias)"), torch.no_grad():
        write(factors)
    assert all(torch.equal(value, before[name]) for name, value in factors.state_dict().items())


def test_split_layers_have_the_attributes_of_the_fused_one() -> None:
    fused, attention = nn.Linear(8, 12), nn.MultiheadAttention(8, 2)
    split, split_attention = split_module(fused, 3), split_module(attention)
    assert (split.in_features, split.out_features) == (8, 12)
    assert torch.equal(split.weight + 0, fused.weight)
    assert torch.equal(split.bias + 0, fused.bias)
    assert torch.equal(split_attention.in_proj_weight + 0, attention.in_proj_weight)
    assert torch.equal(split_attention.in_proj_bias + 0, attention.in_proj_bias)
    assert (split_attention.kdim, split_attention.vdim, split_attention.bias_k) == (8, 8, None)


def test_branches_have_the_attributes_of_the_convolution() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False)), noise(2, 3, 6, 6)
    expand_branches(net, x, RepVGG())
    net.train()(x)
    for norm in (part for part in net.modules() if isinstance(part, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight)
    layer, merged = net[0], copy.deepcopy(net).eval()[0].fuse()
    assert [getattr(layer, name, 0) for name in ATTRIBUTES] == [getattr(merged, name, 0) for name in ATTRIBUTES]
    assert layer.weight.shape == merged.weight.shape
    with pytest.raises(UnsupportedError, match=r"BranchedConv2d\.weight.*in training mode"):
        layer.weight.square()
    layer.eval()
    torch.testing.assert_close(layer.weight + 0, merged.weight)
    torch.testing.assert_close(layer.bias + 0, merged.bias)


class ReadsLayers(nn.Module):
    """Reads its layers as T5, ViT, CLIP and Whisper do, multiplies with one, and looks at the class of another."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.out = nn.Conv2d(3, 32, 4, stride=4), nn.Linear(32, 32)
        self.direct, self.checked = nn.Linear(32, 32), nn.Linear(32, 32)
        self.strict, self.head = nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images.to(self.patches.weight.dtype)).flatten(2).mT
        assert tokens.shape[1] == images.shape[2] // self.patches.stride[0] * (images.shape[3] // 4)
        tokens = self.out(tokens.to(self.out.weight.dtype))
        tokens = F.relu(self.direct(tokens)) + F.linear(tokens, self.direct.weight, self.direct.bias)
        tokens = self.checked(tokens) if isinstance(self.checked, nn.Linear) else tokens
        assert type(self.strict) is nn.Linear, "fused kernel"
        return self.head(self.strict(tokens).mean(1))


def test_a_layer_whose_replacement_does_not_run_stays_dense_with_the_reason() -> None:
    net, images = ReadsLayers().eval(), noise(2, 3, 16, 16)
    before = {name: (type(part), part.training) for name, part in net.named_modules()}
    dense = copy.deepcopy(net)
    plan = factorize(net, images, RankRatio(0.25), dry_run=True)
    assert before == {name: (type(part), part.training) for name, part in net.named_modules()}
    plan = factorize(net, images, RankRatio(0.25))
    assert list(plan.layers) == ["patches", "out", "direct"]
    assert "AssertionError: fused kernel" in plan.skipped["strict"]
    assert "something else" in plan.skipped["checked"]
    assert net(images).shape == dense(images).shape
    assert isinstance(net.direct.weight, EffectiveTensor)
    replaced = factorize(dense, images, MACs(0.8))  # the layers that stay count: the budget is reached without them
    assert {"strict", "checked"} <= set(replaced.skipped)
    assert replaced.after <= 0.8 * replaced.before


def test_a_trial_finds_replacements_that_fail_only_together() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if type(self.a) is not nn.Linear and type(self.b) is not nn.Linear:
                raise ValueError("one of them")
            return self.b(self.a(x))

    from lightning_light.example_input import ExampleInput
    from lightning_light.lowrank.build import exact_factors

    net = Pair()
    new = {name: exact_factors(layer, "linear") for name, layer in net.named_children()}
    assert list(failing_replacements(net, new, ExampleInput.of(noise(2, 4)))) == ["b"]
    with torch.no_grad():
        net.b.bias[0] = torch.nan  # a network that has diverged is compared by its other outputs
    assert list(failing_replacements(net, new, ExampleInput.of(noise(2, 4)))) == ["b"]


class Penalized(L.LightningModule):
    """A weight penalty in the step over every convolution, and code that reads a layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = F.relu(self.first(batch[0].to(self.first.weight.dtype)))
        x = F.relu(self.second(x)).mean((2, 3))
        return F.cross_entropy(self.head(x), batch[1]) + 1e-3 * self.second.weight.square().sum()

    def train_dataloader(self) -> DataLoader:
        return DataLoader([(noise(4, 3, 8, 8), torch.arange(4))] * 4, batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_convolution_whose_weight_the_step_computes_with_is_not_expanded(caplog) -> None:
    module, callbacks = Penalized(), [Reparameterization(ACB())]
    run = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False)
    with caplog.at_level("DEBUG", "lightning.pytorch"):
        run.fit(module)
    assert [name for name, part in module.named_children() if type(part).__name__ == "BranchedConv2d"] == ["first"]
    assert re.search(r"Left alone:.* second \(.*in training mode", caplog.text)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_goes_on_with_a_layer_that_is_read(tmp_path) -> None:
    class Reads(Penalized):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.second(F.relu(self.first(x.to(self.first.weight.dtype)))))
            return self.head(x.mean((2, 3)))

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1]) + 1e-2 * self.second.weight.square().sum()

    ends = []
    for resume in (None, tmp_path / "epoch=1-step=8.ckpt"):
        torch.manual_seed(0)
        module = Reads()
        saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
        callback = LowRankFactorization(Params(0.8), schedule=OneShot(at=0.3))
        beside = [callback] if resume else [callback, saving]
        trainer(*beside).fit(module, ckpt_path=resume)
        ends.append(module.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert any("second.0" in name for name in ends[0])
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
