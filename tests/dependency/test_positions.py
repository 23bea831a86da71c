"""Code that selects channels by position: every operation reads the same channels after a cut."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.dependency import ChannelGroup, DependencyGraph, trace_dependencies
from lightning_light.surgery.edit import cut

Step = Callable[["Picking", Tensor], Tensor]


class Picking(nn.Module):
    """A layer of sixteen channels, and ``step``, which passes ``width`` of them on."""

    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.step = step
        self.stem, self.left, self.right = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.narrow, self.wide = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1)
        self.register_buffer("chosen", torch.tensor([1, 3, 8, 2, 9]))
        self.table = nn.Embedding(16, 5)
        self.last, self.fc = nn.Conv2d(width, 7, 1), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.step(self, self.stem(x))).mean((2, 3)))


def two_parts(net: Picking, x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=1)
    return torch.cat([net.left(left), net.right(right)], dim=1)


def two_parts_by_slices(net: Picking, x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return net.left(x[:, :half]) + net.right(x[:, half:])


def two_parts_kept(net: Picking, x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=1)
    return torch.cat([left, right, net.left(right)], dim=1)


def written(net: Picking, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 4:8] = net.wide(x)
    return y


def shifted(net: Picking, x: Tensor) -> Tensor:
    return torch.cat([x[:, :4].roll(1, 2), x[:, 4:8].roll(-1, 2), x[:, 8:]], dim=1)


PICKS: dict[str, tuple[Step, int]] = {
    "buffer": (lambda net, x: x.index_select(1, net.chosen), 5),
    "chunk": (two_parts, 12),
    "chunk kept": (two_parts_kept, 22),
    "half": (two_parts_by_slices, 6),
    "mean of a slice": (lambda net, x: x * x[:, 4:8].mean(1, keepdim=True), 16),
    "number": (lambda net, x: net.table(x.mean((2, 3)).max(1).indices)[:, :, None, None], 5),
    "one": (lambda net, x: x * x[:, 3:4], 16),
    "roll": (lambda net, x: x.roll(2, 1), 16),
    "select": (lambda net, x: x * x[:, 3].unsqueeze(1), 16),
    "select beside": (lambda net, x: net.wide(x) * x[:, 3].mean((1, 2))[:, None, None, None], 4),
    "shift": (shifted, 16),
    "slice": (lambda net, x: x[:, 4:8], 4),
    "step": (lambda net, x: x[:, ::2], 8),
    "write": (written, 16),
    "gated": (lambda net, x: F.glu(x, 1), 8),
}


def build(name: str) -> tuple[Picking, Tensor]:
    torch.manual_seed(0)
    step, width = PICKS[name]
    return Picking(step, width).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.double)


def free_groups(graph: DependencyGraph) -> list[ChannelGroup]:
    return [group for group in graph.groups if group.reason is None and group.width > 1]


def without(net: nn.Module, graph: DependencyGraph, kept: dict[str, Tensor]) -> nn.Module:
    """The dense network, with zeros where channels have left."""
    net = copy.deepcopy(net)
    for group in graph.groups:
        for member in group.members if group.name in kept else ():
            gone = member.index[~kept[group.name]].reshape(-1)
            net.get_parameter(member.tensor).data.index_fill_(member.dim, gone, 0.0)
    return net


@pytest.mark.parametrize("name", PICKS)
def test_the_cut_network_is_the_dense_one_without_the_channels(name: str) -> None:
    net, x = build(name)
    graph = trace_dependencies(net, (x,))
    generator = torch.Generator().manual_seed(1)
    for trial in range(8):
        kept = {}
        for group in free_groups(graph)[trial % 2 :: 1 + trial % 3]:
            kept[group.name] = torch.rand(group.width, generator=generator) > 0.4
            kept[group.name][torch.randperm(group.width, generator=generator)[:2]] = True
        small = copy.deepcopy(net)
        cut(small, graph.kept_positions(kept), attributes=graph.attributes(small, kept))
        torch.testing.assert_close(small(x), without(net, graph, kept)(x))


@pytest.mark.parametrize("name", ["chunk", "chunk kept", "half", "gated"])
def test_both_parts_of_a_chunk_lose_the_same_positions(name: str) -> None:
    net, x = build(name)
    stem = next(group for group in free_groups(trace_dependencies(net, (x,))) if group.name.startswith("stem"))
    assert next(m for m in stem.members if m.tensor == "stem.weight").index.tolist() == [[i, i + 8] for i in range(8)]


def test_unselected_channels_are_prunable_where_selected_ones_are_protected() -> None:
    net, x = build("shift")
    sizes = [group.width for group in free_groups(trace_dependencies(net, (x,))) if group.name.startswith("stem")]
    assert sizes == [8]


def test_groups_that_are_read_differently_have_unique_names() -> None:
    net, x = build("one")
    names = [group.name for group in trace_dependencies(net, (x,)).groups]
    assert len(names) == len(set(names))


class Squeezed(nn.Module):
    """A layer, and what may stand behind it."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.stem, self.after, self.fc = nn.Conv2d(3, 12, 3), after, nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.after(self.stem(x)).mean((2, 3)))


def test_an_instance_norm_counts_its_channels_once() -> None:
    net, x = Squeezed(nn.InstanceNorm2d(12)), torch.randn(2, 3, 6, 6)
    graph = trace_dependencies(net, (x,))
    attributes = graph.attributes(net, {"stem": torch.arange(12) > 4})
    assert attributes["after"] == {"num_features": 7}


class Projecting(nn.Module):
    """An LSTM with projections, which torch knows by its two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(6, 12, proj_size=8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0].mean(1))


def test_an_lstm_with_projections_stays_wider_inside() -> None:
    graph = trace_dependencies(Projecting(), (torch.randn(2, 4, 6),))
    reason = next(g.reason for g in graph.groups if any(m.tensor == "lstm.weight_hr_l0" and m.dim for m in g.members))
    assert reason is not None
    assert "wider than its output" in reason
