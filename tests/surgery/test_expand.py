"""A compressed checkpoint is loaded by the original class, with the same outputs, or is refused."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.errors import ManifestError, UnsupportedError
from lightning_light.surgery.attachment import attach
from lightning_light.surgery.checkpoint import load_from_checkpoint
from lightning_light.surgery.edit import cut
from lightning_light.surgery.expand import expand_checkpoint
from lightning_light.surgery.manifest import KEY, signed
from tests.surgery.runs import Events, Lit, Loader, halve, trainer
from tests.zoo import noise

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers", "ignore:.*LeafSpec:FutureWarning"
)
X = noise(4, 3, 8, 8)


def stay(*positions: int) -> Tensor:
    return torch.tensor(positions)


class Holds(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Branches(nn.Module):
    """A concatenation, a flattened map, a tied layer: the positions matter."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(10)
        self.fc = nn.Linear(360, 8)
        self.twin = nn.Linear(360, 8)
        self.twin.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1)).sigmoid().flatten(1)
        return self.fc(x) - self.twin(x).square()


class Normed(nn.Module):
    """Channels that a norm of all of them reads."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1) if isinstance(self.norm, nn.LayerNorm) else self.norm(x)
        return self.last(x)


class Soft(nn.Module):
    """Channels that share one sum, in code that no edit_log sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.softmax(self.conv(x), dim=1))


def write(module: pl.LightningModule, path: Any, *cuts: dict[str, dict[int, Tensor]], **attributes: Any) -> None:
    """What a run would: cuts, edit_log, checkpoint."""
    compression_state = attach(module)
    for kept in cuts:
        edit = cut(module, kept, attributes=attributes)
        compression_state.record(edit.entry(), kept=edit.kept)
    run = trainer()
    run.strategy.connect(module)
    run.save_checkpoint(path, weights_only=True)


def cut_branches() -> list[dict[str, dict[int, Tensor]]]:
    """Two cuts: first of `left`, then of `right`, whose channels come second in the concatenation."""
    left, right = stay(1, 3), stay(0, 2, 5)
    after_left = torch.cat([left, torch.arange(4, 10)])
    after_right = torch.cat([stay(0, 1), right + 2])

    def columns(channels: Tensor) -> Tensor:
        return (channels[:, None] * 36 + torch.arange(36)).flatten()

    def event(layer: str, own: Tensor, joint: Tensor) -> dict[str, dict[int, Tensor]]:
        norm = {f"net.norm.{name}": {0: joint} for name in ("weight", "bias", "running_mean", "running_var")}
        layers = {f"net.{layer}.{name}": {0: own} for name in ("weight", "bias")}
        return {**norm, **layers, "net.fc.weight": {1: columns(joint)}}

    return [event("left", left, after_left), event("right", right, after_right)]


def test_the_original_class_loads_it_and_answers_alike(tmp_path) -> None:
    fitted = trainer(Events(cuts=(2, 6)))
    fitted.fit(small := Lit("sgd"), Loader())
    fitted.save_checkpoint(tmp_path / "small.ckpt")
    expand_checkpoint(tmp_path / "small.ckpt", tmp_path / "large.ckpt", Lit(), example_input=X)
    large = Lit.load_from_checkpoint(tmp_path / "large.ckpt")
    assert large.net.conv1.weight.shape == (8, 3, 3, 3)
    assert large.optimizer == "sgd"
    assert (small.net.conv1.out_channels, (large.net.conv1.weight.flatten(1).norm(dim=1) > 0).sum()) == (2, 2)
    assert torch.allclose(large.eval()(X), small.eval()(X), atol=1e-6)
    checkpoint = torch.load(tmp_path / "large.ckpt", weights_only=True)
    assert not {KEY, "optimizer_states", "callbacks"} & checkpoint.keys()


def test_channels_come_back_to_their_old_places(tmp_path) -> None:
    torch.manual_seed(0)
    small = Holds(Branches())
    small(X)  # statistics that are not the first ones
    write(small, tmp_path / "small.ckpt", *cut_branches())
    original = Holds(Branches())
    expand_checkpoint(tmp_path / "small.ckpt", tmp_path / "large.ckpt", original)
    original.load_state_dict(torch.load(tmp_path / "large.ckpt", weights_only=True)["state_dict"])
    assert original.net.left.weight.flatten(1).norm(dim=1).nonzero().flatten().tolist() == [1, 3]
    assert original.net.right.weight.flatten(1).norm(dim=1).nonzero().flatten().tolist() == [0, 2, 5]
    assert torch.allclose(original.eval()(X), small.eval()(X), atol=1e-5)
    assert torch.equal(original.net.fc.weight, original.net.twin.weight)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.GroupNorm(2, 8, affine=False), nn.LayerNorm(8)])
def test_norms_over_channels_are_refused(norm, tmp_path) -> None:
    half = stay(0, 1, 4, 5)
    kept = {"net.conv.weight": {0: half}, "net.conv.bias": {0: half}, "net.last.weight": {1: half}}
    attributes = {}
    if norm.weight is None:
        attributes = {"net.norm": {"num_channels": 4}}
    else:
        kept |= {"net.norm.weight": {0: half}, "net.norm.bias": {0: half}}
    write(Holds(Normed(norm)), tmp_path / "small.ckpt", kept, **attributes)
    fresh = Holds(Normed(nn.GroupNorm(2, 8, affine=norm.weight is not None)))
    if isinstance(norm, nn.LayerNorm):
        fresh = Holds(Normed(nn.LayerNorm(8)))
    with pytest.raises(UnsupportedError, match=r"found \['net.norm \((GroupNorm|LayerNorm)\)'\]"):
        expand_checkpoint(tmp_path / "small.ckpt", tmp_path / "large.ckpt", fresh)
    assert not (tmp_path / "large.ckpt").exists()


def test_what_the_edit_log_cannot_see_is_found_by_running_both(tmp_path) -> None:
    half = stay(0, 1, 4, 5)
    kept = {"net.conv.weight": {0: half}, "net.conv.bias": {0: half}, "net.last.weight": {1: half}}
    write(Holds(Soft()), tmp_path / "small.ckpt", kept)
    with pytest.raises(UnsupportedError, match="differ by more than rounding"):
        expand_checkpoint(tmp_path / "small.ckpt", tmp_path / "large.ckpt", Holds(Soft()), example_input=X)
    assert not (tmp_path / "large.ckpt").exists()


def test_other_operations_unknown_places_and_other_networks_are_refused(tmp_path) -> None:
    fitted = trainer(Events(cuts=(2,), factor_at=3), max_epochs=1)
    fitted.fit(Lit(), Loader())
    fitted.save_checkpoint(path := tmp_path / "factored.ckpt")
    with pytest.raises(UnsupportedError, match=r"found operations \['tests/factor'\]"):
        expand_checkpoint(path, tmp_path / "x", Lit())
    with pytest.raises(ManifestError, match="of another network than this `Holds`"):
        expand_checkpoint(path, tmp_path / "x", Holds(Soft()))

    bare, source = Lit(), Lit()
    edit = cut(source, halve(source, "net.conv1", "net.bn1", "net.conv2"))
    assert edit.shapes["net.conv1.weight"] == ((8, 3, 3, 3), (4, 3, 3, 3))
    attach(bare)
    bare.load_state_dict(source.state_dict())
    write(bare, tmp_path / "bare.ckpt")
    with pytest.raises(UnsupportedError, match="made from a bare state dict"):
        expand_checkpoint(tmp_path / "bare.ckpt", tmp_path / "x", Lit())

    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(ManifestError, match="found none"):
        expand_checkpoint(tmp_path / "plain.ckpt", tmp_path / "x", Lit())
    checkpoint = torch.load(tmp_path / "bare.ckpt", weights_only=True)
    checkpoint[KEY] = signed(checkpoint[KEY] | {"kept": {}})
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(ManifestError, match="after expansion, found"):
        expand_checkpoint(tmp_path / "damaged.ckpt", tmp_path / "x", Lit())


def test_a_network_that_was_not_compressed_stays_what_it_is(tmp_path) -> None:
    module = Lit()
    write(module, tmp_path / "same.ckpt")
    expand_checkpoint(tmp_path / "same.ckpt", tmp_path / "out.ckpt", Lit(), example_input=X)
    assert torch.equal(Lit.load_from_checkpoint(tmp_path / "out.ckpt")(X), module(X))
    assert torch.equal(load_from_checkpoint(Lit, tmp_path / "same.ckpt")(X), module(X))
