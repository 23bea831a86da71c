"""Weight norm and spectral norm of both generations under every method: the weight that is computed with counts."""

import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader

from lightning_light.budgets import MACs, Sparsity
from lightning_light.clustering import WeightClustering, cluster
from lightning_light.criteria import Wanda
from lightning_light.errors import BudgetError, TargetError, UnsupportedError
from lightning_light.lowrank import RankRatio, factorize
from lightning_light.quantization import Int8, fake_quantized, quantize
from lightning_light.schedules import OneShot
from lightning_light.sparsity import DynamicSparseTraining, Filter, RigL, WeightPruning, prune_weights
from lightning_light.structured import prune_channels
from lightning_light.surgery.attachment import state_of
from lightning_light.targets import Targets
from lightning_light.trained_weights import trained_weights
from tests.contract.runs import checkpoints, differences, outcome, trainer
from tests.zoo import noise

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    HOOKED_WEIGHT_NORM = nn.utils.weight_norm

NORMS = {
    "spectral_hook": nn.utils.spectral_norm,
    "spectral": parametrizations.spectral_norm,
    "weight_hook": HOOKED_WEIGHT_NORM,
    "weight": parametrizations.weight_norm,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
LAYERS = ("first", "second", "middle")


class Discriminator(nn.Module):
    """The discriminator of a GAN, or the encoder of a WaveNet: every layer but the last is normalized."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.first, self.second = norm(nn.Conv2d(3, 16, 3, padding=1)), norm(nn.Conv2d(16, 32, 3, stride=2))
        self.middle, self.out = norm(nn.Linear(32, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.second(F.leaky_relu(self.first(x), 0.2)), 0.2)
        return self.out(F.leaky_relu(self.middle(x.mean((2, 3))), 0.2))


def made(norm: str) -> Discriminator:
    torch.manual_seed(0)
    net = Discriminator(NORMS[norm])
    with torch.no_grad():
        for layer in LAYERS:  # filters of different sizes
            parameter = next(trained_weights(net.get_submodule(layer))).parameter
            parameter.mul_(torch.linspace(0.05, 1.0, len(parameter)).view(-1, *[1] * (parameter.ndim - 1)))
    net(noise(2, 3, 8, 8))
    return net.eval()


def weights(net: nn.Module) -> list[Tensor]:
    net.eval()(noise(2, 3, 8, 8))
    return [net.get_submodule(layer).weight.detach() for layer in LAYERS]


@pytest.mark.parametrize("norm", list(NORMS))
def test_masks_hold_in_the_weight_that_is_computed_with(norm) -> None:
    net = made(norm)
    before = torch.cat([weight.abs().flatten() for weight in (*weights(net), net.out.weight)])
    names = [name for name, _ in net.named_parameters()]
    masks = prune_weights(net, None, Sparsity(0.8))
    assert [name for name, _ in net.named_parameters()] == names
    found = weights(net)
    zero = sum(int((weight == 0).sum()) for weight in (*found, net.out.weight))
    rows = sum(len(weight) for weight in found) if norm.startswith("weight") else 0
    assert 0.8 * before.numel() - rows <= zero <= 0.8 * before.numel() + 1
    assert all(weight.isfinite().all() for weight in found)
    assert len(masks) == 4
    if not rows:  # the smallest of the weights that are computed with, although spectral norms differ
        kept = torch.cat([weight[weight != 0].abs() for weight in found])
        assert kept.min() >= before.quantile(0.79) * 0.9
    else:
        assert not any((weight.flatten(1) == 0).all(1).any() for weight in found)
        with pytest.raises(TargetError, match="under weight norm a filter"):
            prune_weights(made(norm), None, Sparsity(0.5), pattern=Filter())


@pytest.mark.parametrize("norm", list(NORMS))
def test_clusters_hold_in_the_weight_that_is_computed_with(norm) -> None:
    net = made(norm)
    if norm.startswith("weight"):
        with pytest.raises(UnsupportedError, match=r"under weight norm.*granularity='channel'"):
            cluster(net, None, 4)
        cluster(net, None, 4, granularity="channel")
        assert all(len(row.unique().round(decimals=6).unique()) <= 5 for weight in weights(net) for row in weight)
    else:
        cluster(net, None, 4)
        assert all(len(weight.unique()) <= 4 for weight in weights(net))


@pytest.mark.parametrize("norm", list(NORMS))
def test_other_methods_follow_a_norm_or_leave_the_layer_alone_by_name(norm) -> None:
    net, x = made(norm), noise(2, 3, 8, 8)
    kind = "spectral norm" if norm.startswith("spectral") else "weight norm"
    plan = factorize(net, x, RankRatio(0.3), dry_run=True)
    assert all(kind in plan.skipped[layer] for layer in LAYERS)
    expected = net(x)
    quantized = made(norm)
    with fake_quantized(quantize(quantized, x, Int8())):
        found = quantized(x)
        assert not torch.equal(found, expected)
        assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    if kind == "weight norm":
        pruned = prune_channels(net, x, MACs(0.5))
        assert pruned.after <= 0.5 * pruned.before
        assert net(x).isfinite().all()
    else:
        with pytest.raises(BudgetError):
            prune_channels(net, x, MACs(0.5))


def test_another_parametrization_is_refused_by_name() -> None:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).mT

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(net[1], "weight", Symmetric())
    with pytest.raises(UnsupportedError, match=r"`1`.*another parametrization.*exclude='1'"):
        prune_weights(net, None, Sparsity(0.5))
    prune_weights(net, None, Sparsity(0.5), targets="0")


class GAN(L.LightningModule):
    """A discriminator that is trained; its losses do not matter."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.net = made(norm).train()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader:
        return DataLoader([(noise(4, 3, 8, 8), torch.arange(4))] * 4, batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


@pytest.mark.parametrize(
    ("norm", "method"),
    [("spectral_hook", "masks"), ("weight", "masks"), ("spectral", "clusters"), ("weight_hook", "clusters")],
)
def test_a_run_keeps_them_and_resumes(norm, method, tmp_path) -> None:
    def callback() -> Any:
        if method == "masks":
            return WeightPruning(Sparsity(0.8), schedule=OneShot(at=0.3))
        return WeightClustering(4, start=0.3, granularity="channel")

    ends = []
    for resume in (None, tmp_path / "epoch=1.ckpt"):
        module = GAN(norm)
        run = trainer(callback(), *(checkpoints(tmp_path) if resume is None else ()))
        run.fit(module, ckpt_path=resume)
        ends.append(outcome(run, module))
    assert not differences(*ends)
    for weight in weights(module.net):
        if method == "masks":
            assert (weight == 0).float().mean() > 0.3
        else:
            assert all(len(row.round(decimals=5).unique()) <= 5 for row in weight)


def test_growing_connections_refuses_weight_norm() -> None:
    with pytest.raises(UnsupportedError, match="found weight norm in"):
        trainer(DynamicSparseTraining(Sparsity(0.5), method=RigL())).fit(GAN("weight"))


class Experts(nn.Module):
    """A mixture of experts as transformers writes it: the weights of all experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(4, 8, 32)), nn.Parameter(torch.randn(4, 16, 8))
        self.router, self.table = nn.Linear(8, 4), nn.Parameter(torch.randn(1, 100, 8))


def test_expert_weights_are_masked_and_other_large_parameters_are_named(caplog) -> None:
    net = nn.Sequential(Experts())
    with caplog.at_level("INFO"):
        masks = prune_weights(net, None, Sparsity(0.9))
    assert list(masks) == ["0.gate_up_proj", "0.down_proj", "0.router.weight"]
    total, zero = (sum(f(net.get_parameter(n)) for n in masks) for f in (Tensor.numel, lambda w: int((w == 0).sum())))
    assert abs(zero - 0.9 * total) <= 1
    assert "not covered" in caplog.text
    assert "['0.table']" in caplog.text
    with pytest.raises(TargetError, match=r"0.down_proj.*layout of its own"):
        prune_weights(nn.Sequential(Experts()), None, Sparsity(0.5), pattern=Filter())


class OwnWeights(nn.Module):
    """A network that holds weights itself, beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(32, 64), nn.Linear(64, 3)
        self.weight, self.mixing = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.linear(F.relu(self.first(x)), self.weight) @ self.mixing))


def test_weights_that_the_network_itself_holds_are_masked_or_named(caplog) -> None:
    net, x = OwnWeights(), noise(2, 32)
    with caplog.at_level("INFO"):
        masks = prune_weights(net, x, Sparsity(0.8))
    assert list(masks) == ["weight", "first.weight", "head.weight"]
    assert (net.weight == 0).float().mean() > 0.5
    assert "['mixing']" in caplog.text
    for targets, layers in {"head": ["head"], Targets(exclude=""): ["first", "head"]}.items():
        masks = prune_weights(OwnWeights(), x, Sparsity(0.8), targets=targets)
        assert list(masks) == [f"{layer}.weight" for layer in layers]
    assert list(prune_weights(OwnWeights(), None, Sparsity(0.8), criterion=Wanda(), data=[x])) == [
        "first.weight",
        "head.weight",
    ]
    caplog.clear()
    with caplog.at_level("INFO"):
        sizes = cluster(clustered := OwnWeights(), x, 4)
    assert [one.name for one in sizes] == ["weight", "first.weight", "head.weight"]
    assert (len(clustered.weight.unique()), "['mixing']" in caplog.text) == (4, True)
    quantized = state_of(quantize(OwnWeights(), x, Int8(), progress_bar=False)).state["quantization_aware_training"]
    assert quantized["layers"].keys() == {"", "first", "head"}
    assert quantized["plan"]["left_float"].keys() == {"mixing"}
    plan = factorize(net, x, MACs(0.9))
    assert set(plan.skipped) >= {"weight", "mixing"}
    assert "not of a layer" in plan.skipped["mixing"]
    del net.weight, net.first, net.head
    with pytest.raises(TargetError, match="besides `mixing`"):
        prune_weights(net, None, Sparsity(0.5))


class Trained(OwnWeights, L.LightningModule):
    """A LightningModule that holds a weight itself."""

    def training_step(self, batch: Tensor) -> Tensor:
        return self(batch).square().mean()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(noise(16, 32), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-5)


def test_clusters_of_a_weight_of_the_module_itself_resume(tmp_path) -> None:
    ends = []
    for resume in (None, tmp_path / "epoch=1.ckpt"):
        torch.manual_seed(0)
        run = trainer(WeightClustering(4, start=0.3), *(checkpoints(tmp_path) if resume is None else ()))
        run.fit(module := Trained(), ckpt_path=resume)
        ends.append(outcome(run, module))
    assert not differences(*ends)
    assert len(module.weight.unique()) == 4
