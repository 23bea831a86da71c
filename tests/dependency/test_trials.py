"""Trials without channels: failures are attributed to groups, in a number of passes that does not grow with depth."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.dependency import DependencyGraph, trace_dependencies, trials
from lightning_light.surgery.edit import cut


class FixedHeads(nn.Module):
    """Attention in which the number of heads follows from a fixed head width."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 8
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))
        return x + self.down(F.relu(self.up(x)))


class CountedOnce(nn.Module):
    """One attribute counts the positions of query, key and value heads, whose widths differ from the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 8
        self.q, self.k, self.v, self.o = nn.Linear(32, 48), nn.Linear(32, 24), nn.Linear(32, 24), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return x + self.o(y.transpose(1, 2).reshape(b, n, -1))


class SplitHeads(nn.Module):
    """Attributes count the positions of keys and values, which one layer makes together."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = 2, 6, 10
        self.qkv, self.o = nn.Linear(32, 2 * (6 + 6 + 10)), nn.Linear(20, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        sizes = [self.key_dim, self.key_dim, self.value_dim]
        q, k, v = self.qkv(x).view(b, n, self.heads, -1).split(sizes, dim=3)
        scores = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1) * 0.3
        y = scores.softmax(-1) @ v.permute(0, 2, 1, 3)
        return x + self.o(y.transpose(1, 2).reshape(b, n, self.heads * self.value_dim))


class EqualParts(nn.Module):
    """Keys and values are as wide as the input, and attributes count both parts and the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim, self.out_dim = 4, 8, 8, 32
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        sizes = [self.key_dim, self.key_dim, self.value_dim]
        q, k, v = self.qkv(x).view(b, n, self.heads, -1).transpose(1, 2).split(sizes, dim=3)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.biases(n), scale=0.3)
        return x + self.o(y.transpose(1, 2).reshape(b, n, self.out_dim))

    def biases(self, n: int) -> Tensor:
        return torch.zeros(self.heads, n, n, dtype=torch.double)


class CachedBiases(EqualParts):
    """A forward pass in evaluation mode stores what later ones read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 5))
        self.cache: dict[str, Tensor] = {}

    def biases(self, n: int) -> Tensor:
        if "biases" not in self.cache:
            self.cache["biases"] = self.table[:, :, None].expand(-1, -1, n) + 0.1
        return self.cache["biases"]


class Asserting(nn.Module):
    """The inner width is checked in Python, outside of all torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(32, 48), nn.Linear(32, 20), nn.Linear(68, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.up(x))
        if y.shape[-1] != 48:
            raise ValueError(f"expected 48 channels, found {y.shape[-1]}")
        return x + self.down(torch.cat([y, F.relu(self.gate(x))], dim=-1))


class TwoPaths(nn.Module):
    """For another width, other functions are called, which are right too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = torch.cat([part.relu() for part in y.split(16, dim=-1)], dim=-1) if y.shape[-1] == 48 else F.relu(y)
        return x + self.down(y)


class TwoPathsOneWrong(TwoPaths):
    """For another width, a path whose size is fixed."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = F.relu(y) if y.shape[-1] == 48 else y[..., :24].tanh().repeat(1, 1, 2)
        return x + self.down(y)


class ReadsValues(nn.Module):
    """The path depends on a value that a product computes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).square()
        y = y.view(*y.shape[:-1], -1) if float(y.detach().sum()) > 0 else y[..., :24].repeat(1, 1, 2)
        return x + self.down(y)


class ViewsItsWeight(nn.Module):
    """A weight is viewed, which only a contiguous one can be."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Conv1d(48, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.down.weight
        return x + F.linear(self.up(x), weight.view(weight.shape[:2]), self.down.bias)


class Counted(nn.Sequential):
    """Count the passes of the whole network."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.counted = SimpleNamespace(passes=0)  # no container, in which nothing would stay

    def forward(self, x: Tensor) -> Tensor:
        self.counted.passes += 1
        return super().forward(x)


def stacked(block: Callable[[], nn.Module], depth: int) -> tuple[Counted, Tensor]:
    torch.manual_seed(0)
    net = Counted(nn.Linear(8, 32), *(block() for _ in range(depth)), nn.Linear(32, 4)).double().eval()
    return net, torch.randn(2, 5, 8, dtype=torch.double)


def free(graph: DependencyGraph) -> set[str]:
    return {group.name for group in graph.groups if group.reason is None}


@pytest.mark.parametrize("block", [FixedHeads, Asserting, TwoPaths, TwoPathsOneWrong])
def test_the_number_of_passes_does_not_grow_with_depth(block) -> None:
    passes = []
    for depth in (2, 5):
        net, x = stacked(block, depth)
        trace_dependencies(net, (x,))
        passes.append(net.counted.passes)
    assert passes[1] <= passes[0] + 3


def test_what_a_forward_pass_caches_takes_no_further_passes() -> None:
    passes = []
    for block in (EqualParts, CachedBiases):
        net, x = stacked(block, 2)
        assert free(trace_dependencies(net, (x,))) == {"0", "1.qkv", "2.qkv"}
        passes.append(net.counted.passes)
    assert passes[0] == passes[1]
    assert net[1].cache == {}


@pytest.mark.parametrize(
    ("block", "names"),
    [
        (CountedOnce, {"q"}),
        (SplitHeads, {"qkv"}),
        (EqualParts, {"qkv"}),
        (Asserting, {"gate"}),
        (TwoPaths, {"up"}),
        (TwoPathsOneWrong, set()),
        (ReadsValues, {"up"}),
        (ViewsItsWeight, {"up"}),
    ],
)
def test_what_fails_is_protected_and_nothing_else(block, names) -> None:
    net, x = stacked(block, 2)
    graph = trace_dependencies(net, (x,))
    assert {name.partition("#")[0] for name in free(graph)} == {"0", *(f"{i}.{name}" for i in (1, 2) for name in names)}
    kept = {g.name: torch.arange(g.width) % 3 > 0 for g in graph.groups if g.reason is None}
    dense = net(x)
    with torch.no_grad():
        for group in (group for group in graph.groups if group.name in kept):
            for member in group.members:
                if member.role != "in":
                    positions = member.index[~kept[group.name]].reshape(-1)
                    net.get_parameter(member.tensor).index_fill_(member.dim, positions, 0.0)
        zeroed = net(x)
        cut(net, graph.kept_positions(kept), attributes=graph.attributes(net, kept))
        torch.testing.assert_close(net(x), zeroed)
    assert not torch.allclose(dense, zeroed)


def test_the_reason_names_the_error() -> None:
    net, x = stacked(Asserting, 2)
    reasons = {group.name: group.reason for group in trace_dependencies(net, (x,)).groups}
    assert "expected 48 channels" in reasons["1.up"]
    assert "expected 48 channels" in reasons["2.up"]


def test_a_long_trace_is_logged(monkeypatch, caplog) -> None:
    monkeypatch.setattr(trials, "_SILENT_SECONDS", 0.0)
    net, x = stacked(ViewsItsWeight, 1)
    with caplog.at_level("INFO"):
        trace_dependencies(net, (x,))
    assert [record.message for record in caplog.records if "`Counted`" in record.message]
