"""Residual blocks are found by their function; a network without a block equals one whose block adds nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_light as ll
from lightning_light.depth import BlockInfluence, OutputChange, prune_blocks
from lightning_light.depth.blocks import find_blocks, without_blocks
from lightning_light.example_input import ExampleInput
from lightning_light.targets import Targets


class Basic(nn.Module):
    """Post-activation, as in He et al., 2016."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential() if channels == out else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.stages = nn.ModuleList(
            [nn.Sequential(Basic(8, 8), Basic(8, 8)), nn.Sequential(Basic(8, 16, 2), Basic(16, 16), Basic(16, 16))]
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


class PreNorm(nn.Module):
    """A pre-norm transformer layer that takes a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PreNorm() for _ in range(4)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[1], x.shape[1])
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


IMAGES, TOKENS = torch.randn(4, 3, 16, 16), torch.randn(4, 6, 8)


def test_residual_blocks_are_found_in_convolutional_networks_and_transformers() -> None:
    found = find_blocks(ResNet(), ExampleInput((IMAGES,)), Targets())
    assert found.names == ["stages.0.0", "stages.0.1", "stages.1.1", "stages.1.2"]
    assert found.kept["stages.1.0"] == "changes the shape of its input: (4, 8, 16, 16) -> (4, 16, 8, 8)"
    assert find_blocks(Transformer(), ExampleInput((TOKENS,)), Targets()).names == [f"layers.{i}" for i in range(4)]


def test_modules_that_are_no_residual_blocks_are_kept_with_the_reason() -> None:
    shared = Basic(8, 8)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)), shared, shared)
    found = find_blocks(net, ExampleInput((torch.randn(2, 8, 4, 4),)), Targets())
    assert found.names == []
    assert found.kept == {
        "0": "not a residual block: with zero weights its output is not its input",
        "1": "called 2 times per forward pass",
    }


@pytest.mark.parametrize(("net", "x"), [(ResNet(), IMAGES), (Transformer(), TOKENS)], ids=["cnn", "transformer"])
def test_scores_are_those_of_the_formulas(net: nn.Module, x: Tensor) -> None:
    net.eval()
    names = find_blocks(net, ExampleInput((x,)), Targets()).names
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: seen.update({name: (a[0], o)}))
    with torch.no_grad():
        plain = net(x)
        influence = {
            name: 1 - F.cosine_similarity(a, b, dim=1 if a.dim() == 4 else -1).mean().item()
            for name, (a, b) in seen.items()
        }
        changes = {}
        for name in names:
            with without_blocks(net, [name]):
                changes[name] = ((net(x) - plain).square().sum() / plain.square().sum()).item()
    assert BlockInfluence()(net, names, [ExampleInput((x,))]) == pytest.approx(influence, rel=1e-4)
    assert OutputChange()(net, names, [ExampleInput((x,))]) == pytest.approx(changes, rel=1e-4)


def test_the_least_important_blocks_go_until_the_budget_is_met() -> None:
    net = ResNet()
    for path, scale in (("stages.0.1", 1e-3), ("stages.1.1", 1e-2)):  # these add almost nothing
        nn.init.constant_(net.get_submodule(path).bn2.weight, scale)
    expected = [net.stages[0][0], net.stages[1][2]]
    plan = prune_blocks(net, IMAGES, ll.MACs(0.7), data=[IMAGES, IMAGES.flip(0)])
    assert plan.removed == ["stages.0.1", "stages.1.1"]
    assert plan.after <= 0.7 * plan.before
    assert ll.MACs(0.7).measure(net, ExampleInput((IMAGES,))) == plan.after
    assert [net.stages[0][0], net.stages[1][2]] == expected
    assert net(IMAGES).shape == (4, 5)


def test_a_budget_out_of_reach_is_refused_and_the_network_is_unchanged() -> None:
    net = ResNet()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ll.BudgetError, match=r"without any of the 4 residual blocks.*stages\.1\.0: changes the shape"):
        prune_blocks(net, IMAGES, ll.MACs(0.1))
    with pytest.raises(ValueError, match="expected inputs to calibrate on, found no batch"):
        prune_blocks(net, IMAGES, ll.MACs(0.7), data=iter([]))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_removed_block_leaves_the_optimizer_and_the_file_is_the_smaller_network(tmp_path) -> None:
    net = Transformer()
    optimizer = torch.optim.AdamW(net.parameters())
    plan = prune_blocks(net, TOKENS, ll.Params(0.6), optimizers=[optimizer])
    assert len(plan.removed) == 2
    assert {id(p) for p in net.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    report = ll.export_model(net, TOKENS, tmp_path / "net.ptl")
    assert report.params == sum(p.numel() for p in net.parameters())
