"""Gathered evidence is what the definitions say, in training and without a Trainer, and survives a resume."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from lightning_light.criteria import (
    Activation,
    BatchNormScale,
    Hessian,
    Magnitude,
    Movement,
    SoftMovement,
    Taylor,
    Wanda,
    channel_scores,
)
from lightning_light.criteria.collector import EvidenceCollector, input_rows
from lightning_light.criteria.data import collect_evidence
from lightning_light.criteria.gathered import KINDS, Gathered
from lightning_light.criteria.group_criterion import check_needs
from lightning_light.errors import UnsupportedError
from lightning_light.surgery.edit import cut


class Net(nn.Module):
    """A grouped and a transposed convolution, a layer that is called twice, a frozen one, and one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.shared = nn.Linear(6, 6)
        self.alias = self.shared
        self.frozen = nn.Linear(6, 5).requires_grad_(False)
        self.unused = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.norm(self.conv(x)))).mean(dim=(2, 3))
        return self.frozen(self.alias(F.relu(self.shared(x))))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(3, 4, 6, 6), torch.randint(5, (3,))) for _ in range(count)]


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def train(net: Net, collector: EvidenceCollector, data: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in data:
        collector.begin_batch()
        optimizer.zero_grad()
        cross_entropy(net(batch[0]), batch).backward()
        collector.observe_step(p for group in optimizer.param_groups for p in group["params"])
        optimizer.step()
        collector.end_batch()


def storages_equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(storages_equal(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def test_gradients_are_means_over_steps(net: Net) -> None:
    data, found = batches(3), {"grad": 0.0, "grad_squared": 0.0}
    expected = copy.deepcopy(net).eval()
    for batch in data:
        expected.zero_grad()
        cross_entropy(expected(batch[0]), batch).backward()
        gradient = expected.conv.weight.grad
        found = {"grad": found["grad"] + gradient / 3, "grad_squared": found["grad_squared"] + gradient**2 / 3}
    gathered = collect_evidence(net, data, frozenset(found), batches=3, loss=cross_entropy)
    for kind, value in found.items():
        assert torch.allclose(gathered.get(kind, "conv.weight"), value, atol=1e-7)
    assert gathered.get("grad", "frozen.weight") is None
    assert gathered.get("grad", "alias.weight") is None  # a shared parameter goes by its first name
    assert gathered.get("grad", "shared.weight") is not None


def test_layers_are_seen_at_every_call(net: Net) -> None:
    data, seen = batches(2), []
    for batch in data:
        expected = copy.deepcopy(net).eval()
        handle = expected.shared.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        with torch.no_grad():
            expected(batch[0])
        handle.remove()
    gathered = collect_evidence(net, data, KINDS - {"grad", "grad_squared", "movement"}, batches=2)
    inputs, outputs = (torch.cat(tensors) for tensors in zip(*seen, strict=True))
    assert torch.allclose(gathered.get("inputs", "shared"), inputs.norm(dim=0), rtol=1e-5)
    assert torch.allclose(gathered.get("activation", "shared"), outputs.abs().mean(dim=0), rtol=1e-5)
    covariance = (inputs.T @ inputs / len(inputs)).double()
    assert torch.allclose(gathered.get("input_covariance", "shared")[0], covariance, rtol=1e-4)
    assert torch.allclose(gathered.get("input_absolute", "shared")[0], inputs.abs().mean(0).double(), rtol=1e-5)
    assert gathered.get("inputs", "unused") is None


@pytest.mark.parametrize("layer", ["conv", "up", "shared"])
def test_inputs_of_a_weight_are_in_its_layout(net: Net, layer: str) -> None:
    """The score of a weight does not depend on which axis stands in front."""
    gathered = collect_evidence(net, batches(2), frozenset({"inputs"}), batches=2)
    module = net.get_submodule(layer)
    scores = [
        Wanda()(
            gathered.evidence(Wanda(), module.weight, name=f"{layer}.weight", layer=layer, module=module, dim=dim)
        ).movedim(0, dim)
        for dim in (0, 1)
    ]
    assert torch.equal(*scores)
    norms = gathered.get("inputs", layer)
    first = {"conv": norms[0], "up": norms[0], "shared": norms[0]}[layer] * module.weight[0, 0].abs()
    assert torch.allclose(scores[0][0, 0], first)
    if layer == "conv":  # the second group reads the second half of the inputs
        assert torch.allclose(scores[0][-1, 0], norms[2] * module.weight[-1, 0].abs())


def test_inputs_of_an_attention() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    query, other = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    call = {"query": query, "key": other, "value": other}
    net = nn.ModuleDict({"attn": attention})
    net.forward = lambda **kwargs: attention(**kwargs)[0]  # type: ignore[method-assign]
    gathered = collect_evidence(net, [call], frozenset({"inputs"}), batches=1)
    weight = attention.in_proj_weight
    evidence = gathered.evidence(Wanda(), weight, name="attn.in_proj_weight", layer="attn", module=attention)
    scores = Wanda()(evidence)
    assert torch.allclose(scores[0], weight[0].abs() * query.norm(dim=(0, 1)), rtol=1e-5)
    assert torch.allclose(scores[-1], weight[-1].abs() * other.norm(dim=(0, 1)), rtol=1e-5)
    with pytest.raises(UnsupportedError, match="out_proj"):
        gathered.evidence(
            Wanda(),
            attention.out_proj.weight,
            name="attn.out_proj.weight",
            layer="attn.out_proj",
            module=attention.out_proj,
        )


def test_modules_inside_a_transformer_layer_are_seen() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    gathered = collect_evidence(layer, [torch.randn(2, 3, 8)], frozenset({"inputs", "activation"}), batches=1)
    for name in ("linear1", "linear2", "self_attn:query"):
        assert gathered.get("inputs", name) is not None
    assert gathered.get("activation", "norm1").shape == (8,)


def test_patches_multiplied_with_the_kernel_are_the_convolution(net: Net) -> None:
    x, conv = batches(1)[0][0], net.conv
    rows = input_rows(conv, x)
    kernel = conv.weight.reshape(2, 4, -1)
    outputs = torch.einsum("gpi,goi->pgo", rows, kernel).reshape(len(rows[0]), -1) + conv.bias
    assert torch.allclose(outputs, conv(x).movedim(1, -1).flatten(0, 2), atol=1e-5)


@pytest.mark.parametrize("criterion", [Movement(), SoftMovement()])
def test_movement_accumulates_over_every_step(net: Net, criterion: Movement) -> None:
    storage: dict[str, Any] = {}
    collector = EvidenceCollector.for_criterion(net, ["conv"], criterion, storage)
    expected, weight = torch.zeros_like(net.conv.weight), net.conv.weight
    for batch in batches(3):
        collector.begin_batch(gather=False)
        net.zero_grad()
        cross_entropy(net(batch[0]), batch).backward()
        assert weight.grad is not None
        expected = criterion.accumulate(expected, weight.detach(), weight.grad)
        collector.observe_step(net.parameters())
        with torch.no_grad():
            weight -= 0.1 * weight.grad
        collector.end_batch()
    collector.forget()
    found = collector.means()
    assert torch.equal(found.get("movement", "conv.weight"), expected)
    assert found.get("movement", "shared.weight") is None
    collector.remove()


def test_interrupted_gathering_goes_on_bit_for_bit(net: Net, tmp_path: Any) -> None:
    data, needs = batches(5), frozenset(KINDS)
    whole: dict[str, Any] = {}
    straight = copy.deepcopy(net)
    train(straight, EvidenceCollector(straight, None, needs, whole), data)

    first: dict[str, Any] = {}
    collector = EvidenceCollector(net, None, needs, first)
    train(net, collector, data[:2])
    collector.remove()
    torch.save({"state": first, "model": net.state_dict()}, tmp_path / "last.ckpt")
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)
    resumed = Net()
    resumed.frozen.requires_grad_(False)
    resumed.load_state_dict(loaded["model"])
    second = EvidenceCollector(resumed, None, needs, lambda: loaded["state"])
    train(resumed, second, data[2:])

    assert second.batches == 5
    assert storages_equal(loaded["state"], whole)


def test_batches_outside_do_not_count(net: Net) -> None:
    storage: dict[str, Any] = {}
    collector = EvidenceCollector(net, None, frozenset(KINDS), storage)
    collector.begin_batch(gather=False)
    net(batches(1)[0][0])
    collector.end_batch()
    net(batches(1)[0][0])  # a validation batch
    assert collector.batches == 0
    assert not collector.means().tensors["movement"]
    assert collector.means().tensors.keys() == {"movement"}
    collector.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_steps_that_overflow_are_left_out(net: Net) -> None:
    data, needs = batches(2), frozenset({"grad", "grad_squared", "movement"})
    sound, broken = {}, {}
    for storage, overflow in ((sound, False), (broken, True)):
        collector = EvidenceCollector(net, None, needs, storage)
        for index, batch in enumerate(data[:1] if not overflow else data):
            collector.begin_batch()
            net.zero_grad()
            cross_entropy(net.eval()(batch[0]), batch).backward()
            if index == 1:
                net.conv.weight.grad[0] = torch.inf
            collector.observe_step(net.parameters())
            collector.end_batch()
    kinds = ("grad", "grad_squared", "movement")
    assert all(storages_equal(sound[kind], broken[kind]) for kind in kinds)


def test_gradients_follow_a_cut(net: Net) -> None:
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    storage: dict[str, Any] = {}
    collector = EvidenceCollector(plain, None, frozenset({"grad", "movement"}), storage)
    collector.begin_batch()
    plain(torch.randn(5, 4)).square().sum().backward()
    collector.observe_step(plain.parameters())
    collector.end_batch()
    before = collector.means()
    stays = torch.tensor([0, 2, 5])
    kept = {"0.weight": {0: stays}, "0.bias": {0: stays}, "2.weight": {1: stays}}
    cut(plain, kept)
    collector.follow(kept)
    for kind in ("grad", "movement"):
        assert torch.equal(collector.means().get(kind, "0.weight"), before.get(kind, "0.weight")[stays])
        assert torch.equal(collector.means().get(kind, "2.weight"), before.get(kind, "2.weight")[:, stays])
    assert collector.batches == 1


def test_layer_evidence_is_gathered_again_after_a_cut() -> None:
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    collector = EvidenceCollector(plain, None, frozenset({"inputs", "movement"}), {})
    for _ in range(2):
        collector.begin_batch()
        plain.zero_grad()
        plain(torch.randn(5, 4)).square().sum().backward()
        collector.observe_step(plain.parameters())
        collector.end_batch()
        stays = torch.arange(plain[0].out_features - 1)
        kept = {"0.weight": {0: stays}, "0.bias": {0: stays}, "2.weight": {1: stays}}
        cut(plain, kept)
        collector.follow(kept)
        assert collector.batches == 0
        assert collector.means().get("inputs", "2") is None
        assert collector.means().get("movement", "2.weight").shape == plain[2].weight.shape
    plain[2] = nn.Linear(4, 3)
    collector.follow(None)
    assert collector.means().get("movement", "2.weight").shape == plain[2].weight.shape
    plain[2] = nn.Linear(4, 2)
    collector.follow(None)
    assert collector.means().get("movement", "2.weight") is None
    collector.begin_batch()
    plain(torch.randn(5, 4))
    collector.end_batch()
    assert collector.means().get("inputs", "2").shape == (4,)


def test_processes_are_reduced_at_once_per_type(net: Net) -> None:
    """The mean over two processes: total and count of both, whatever the sizes of their batches."""
    data, calls = batches(2), []
    data[1] = (data[1][0][:1], data[1][1][:1])
    needs, flats = frozenset({"input_covariance", "inputs", "activation"}), []
    for batch in data:
        collector = EvidenceCollector(net.eval(), None, needs, {})
        collector.begin_batch()
        net(batch[0])
        collector.end_batch(lambda flat: flats.append(flat.clone()) or flat)
        collector.remove()
    half = len(flats) // 2
    means = [(a + b) / 2 for a, b in zip(flats[:half], flats[half:], strict=True)]
    reduced = EvidenceCollector(net, None, needs, {})
    reduced.begin_batch()
    net(data[0][0])
    reduced.end_batch(lambda flat: calls.append(flat) or means[len(calls) - 1])
    together = collect_evidence(net, data, needs, batches=2)
    assert len(calls) == 2  # float32 and float64
    found = reduced.means().get("input_covariance", "shared")
    assert torch.allclose(found, together.get("input_covariance", "shared"), rtol=1e-5)


def test_without_a_trainer_nothing_changes(net: Net) -> None:
    cross_entropy(net(batches(1)[0][0]), batches(1)[0]).backward()
    before, gradient = copy.deepcopy(net.state_dict()), net.conv.weight.grad
    assert gradient is not None
    data, copied, random_state = batches(2), gradient.clone(), torch.get_rng_state()
    collect_evidence(net, data, frozenset(KINDS), batches=2, loss=cross_entropy)
    assert net.conv.weight.grad is gradient
    assert torch.equal(gradient, copied)
    assert storages_equal(dict(net.state_dict()), dict(before))
    assert net.training
    assert not net.conv._forward_hooks
    assert not net.conv._forward_pre_hooks
    assert torch.equal(random_state, torch.get_rng_state())


def test_the_training_step_gives_the_loss(net: Net) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            loss = cross_entropy(self.net(batch[0]), batch)
            self.log("loss", loss)
            return {"loss": loss}

    module = Module()
    found = collect_evidence(module, batches(2), frozenset({"grad"}), batches=2)
    expected = collect_evidence(net, batches(2), frozenset({"grad"}), batches=2, loss=cross_entropy)
    assert torch.equal(found.get("grad", "net.conv.weight"), expected.get("grad", "conv.weight"))
    assert "log" not in vars(module)


def test_gradients_without_a_loss_are_refused(net: Net) -> None:
    before = parameters_to_vector(net.parameters())
    with pytest.raises(ValueError, match=r"expected `loss`, a function"):
        collect_evidence(net, batches(1), frozenset({"grad"}), batches=1)
    with pytest.raises(ValueError, match="at least one batch"):
        collect_evidence(net, [], frozenset({"inputs"}), batches=1)
    with pytest.raises(ValueError, match="hessian"):
        EvidenceCollector(net, None, frozenset({"hessian"}), {})
    assert torch.equal(before, parameters_to_vector(net.parameters()))


@pytest.mark.parametrize("criterion", [Taylor(), Hessian(), Wanda(), Movement(), Activation()])
def test_needs_are_checked(net: Net, criterion: Any) -> None:
    check_needs("prune", criterion)
    with pytest.raises(UnsupportedError, match=f"`prune.criterion={type(criterion).__name__}"):
        check_needs("prune", criterion, frozenset())
    check_needs("prune", Magnitude(), frozenset())


def test_a_criterion_of_channels_is_refused_where_single_weights_are_scored() -> None:
    check_needs("prune", BatchNormScale(), scores_groups=True)
    with pytest.raises(UnsupportedError, match=r"`prune\(criterion=BatchNormScale\(\)\)`: .* scores whole channels"):
        check_needs("prune", BatchNormScale())


@pytest.mark.parametrize("criterion", [Taylor(), Hessian(), Wanda(), Movement(), Activation()])
def test_every_criterion_scores_a_layer(net: Net, criterion: Any) -> None:
    gathered = collect_evidence(net, batches(2), criterion.needs, batches=2, loss=cross_entropy)
    evidence = gathered.evidence(criterion, net.conv.weight, name="conv.weight", layer="conv", module=net.conv)
    scores = channel_scores(criterion(evidence))
    assert scores.shape == (8,)
    assert len(scores.unique()) == 8
    with pytest.raises(UnsupportedError, match=r"`unused.weight`.*found none"):
        gathered.evidence(criterion, net.unused.weight, name="unused.weight", layer="unused", module=net.unused)


def test_nothing_gathered_has_no_evidence() -> None:
    assert Gathered().get("grad", "weight") is None


@pytest.mark.parametrize("before", [(), (8,), (8, 3)], ids=str)
def test_layers_that_were_compiled_before_are_seen_in_every_batch(before) -> None:
    net = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend="eager"), nn.Linear(4, 2))
    for samples in before:
        net(torch.randn(samples, 4)).sum().backward()
    storage: dict[str, Any] = {}
    collector = EvidenceCollector(net, None, frozenset({"inputs"}), storage)
    for gather, samples in ((True, 8), (False, 8), (True, 3), (True, 8)):
        collector.begin_batch(gather)
        net(torch.randn(samples, 4)).sum().backward()
        collector.end_batch()
    collector.remove()
    assert {name: int(entry["count"]) for name, entry in storage["inputs"].items()} == {"0._orig_mod.0": 3, "1": 3}


def test_compiled_code_is_back_after_two_methods_have_gathered() -> None:
    """Callbacks end a batch in the order in which they began it."""
    ran: list[str] = []

    def backend(graph: Any, example: Any) -> Any:
        return lambda *args: (ran.append("compiled"), graph(*args))[1]

    net = nn.Sequential(torch.compile(nn.Linear(4, 4), backend=backend), nn.Linear(4, 2))
    net(torch.randn(8, 4))
    assert ran == ["compiled"]
    collectors = [EvidenceCollector(net, None, frozenset({"inputs"}), {}) for _ in range(2)]
    for collector in collectors:
        collector.begin_batch()
    net(torch.randn(8, 4))
    assert ran == ["compiled"]
    for collector in collectors:
        collector.end_batch()
    net(torch.randn(8, 4))
    assert ran == ["compiled"] * 2
    collectors[0].begin_batch()
    for collector in collectors:  # an exception has ended the run in the middle of a batch
        collector.remove()
    net(torch.randn(8, 4))
    assert ran == ["compiled"] * 3
