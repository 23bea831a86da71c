"""Sizes that the code keeps as numbers of its modules, and layers of the user's own: they are pruned, exactly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light import MACs, prune_channels
from lightning_light.dependency import DependencyGraph, trace_dependencies
from lightning_light.structured import Widths
from lightning_light.surgery.edit import cut


class Transposed(nn.Module):
    """A linear layer as GPT-2 writes it: the weight is ``(in, out)``, and the width is a number of the module."""

    def __init__(self, inputs: int, nf: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view((*x.size()[:-1], self.nf))


class GPT2(nn.Module):
    """A block of such layers: query, key and value are split by one number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.split_size, self.size_of_head = nn.Linear(6, 24), 16, 8
        self.qkv, self.out = Transposed(24, 48), Transposed(16, 24)
        self.up, self.down, self.head = Transposed(24, 40), Transposed(40, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = (y.view(*y.shape[:-1], -1, self.size_of_head) for y in self.qkv(x).split(self.split_size, dim=2))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        x = x + self.out(y.contiguous().view(*y.shape[:-2], self.split_size))
        return self.head(x + self.down(F.relu(self.up(x))))


class Biased(nn.Module):
    """Attention with a table of position biases, as T5 writes it; ``index`` picks the distances, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.num_heads, self.kv = nn.Linear(6, 20), nn.Linear(20, 3), 4, 6
        self.q, self.k, self.v = (nn.Linear(20, 24) for _ in range(3))
        self.o = nn.Linear(24, 20)
        self.table = nn.Parameter(torch.randn(9, 4))
        self.register_buffer("index", torch.randint(9, (25,), generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.num_heads, self.kv).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) * 0.3 + self.table[self.index].view(n, n, -1).permute(2, 0, 1)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1)
        return self.head(x + self.o(y))


class Literal(nn.Module):
    """Attention whose sizes stand in the code; its inner width equals that of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 32), nn.Linear(32, 3)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = (layer(x).reshape(2, 5, 4, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.head(x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 32)))


class Loop(nn.Module):
    """A recurrent cell, whose first state has a size of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.states, self.head = nn.LSTMCell(6, 20), 20, nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.states), x.new_zeros(x.shape[0], self.states)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


class Experts(nn.Module):
    """Experts in one tensor, called for the tokens that chose them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Linear(6, 20), nn.Linear(20, 3), nn.Linear(20, 3)
        self.gate_up, self.down = nn.Parameter(torch.randn(3, 32, 20)), nn.Parameter(torch.randn(3, 20, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(0, 1)
        share, chosen = self.gate(x).softmax(-1).topk(1)
        out = torch.zeros_like(x)
        for number in range(3):
            tokens = (chosen[:, 0] == number).nonzero()[:, 0]
            gate, up = F.linear(x[tokens], self.gate_up[number]).chunk(2, dim=-1)
            out.index_add_(0, tokens, F.linear(F.silu(gate) * up, self.down[number]) * share[tokens])
        return self.head(x + out)


class Messages(nn.Module):
    """A graph network: the largest message of every node's neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.message, self.head = nn.Linear(6, 20), nn.Linear(20, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        target = torch.tensor([0, 1, 1, 3, 4])
        y = self.message(F.relu(self.first(x[0])))
        nodes = y.new_zeros(5, y.shape[1]).scatter_reduce_(0, target[:, None].expand_as(y), y, "amax")
        return self.head(nodes + y.gather(0, target[:, None].expand_as(y)))


class Maps(nn.Module):
    """A linear layer makes a map of four by four: a channel is sixteen of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 12
        self.first, self.conv = nn.Linear(6, 12 * 4 * 4), nn.Conv2d(12, 3, 3)
        self.norm = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.norm(self.first(x.flatten(0, 1)).view(-1, self.channels, 4, 4)))).mean((2, 3))


class Functional(nn.Module):
    """Attention by torch's function with projections of one's own, which fixes no number of the module.

    The scores are multiplied with the square root by which torch divides them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.heads = nn.Linear(6, 24), nn.Linear(24, 3), 4
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(24, 24) for name in "qkvo"}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).transpose(0, 1)
        for layer in self.layers:
            width, o = x.shape[-1], layer["o"]
            projections = {f"{name}_proj_weight": layer[name].weight for name in "qkv"}
            none = torch.empty(0), None, None, None, False, 0.0
            y, _ = F.multi_head_attention_forward(
                x * (width / self.heads) ** 0.5,
                x,
                x,
                width,
                self.heads,
                *none,
                o.weight,
                o.bias,
                self.training,
                use_separate_proj_weight=True,
                **projections,
            )
            x = x + y
        return self.head(x.transpose(0, 1))


class TalkingHeads(nn.Module):
    """Attention whose scores are mixed between the heads, as CaiT writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.heads = nn.Linear(6, 20), nn.Linear(20, 3), 4
        self.q, self.k, self.v = (nn.Linear(20, 24) for _ in range(3))
        self.mix, self.o = nn.Linear(4, 4), nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = (y.view(*y.shape[:2], self.heads, -1).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        scores = self.mix((q @ k.transpose(-1, -2)).movedim(1, -1)).softmax(2).movedim(-1, 1)
        return self.head(x + self.o((scores @ v).transpose(1, 2).flatten(2)))


def traced(kind: type[nn.Module], heads: str = "dim") -> tuple[nn.Module, Tensor, DependencyGraph]:
    torch.manual_seed(0)
    net, x = kind().double().eval(), torch.randn(2, 5, 6, dtype=torch.double)
    return net, x, trace_dependencies(net, (x,), heads=heads)


def free(graph: DependencyGraph) -> dict[str, int]:
    return {g.name.partition("#")[0]: g.width for g in graph.groups if g.reason is None and g.width > 1}


@pytest.mark.parametrize(
    ("kind", "heads", "groups"),
    [
        (GPT2, "dim", {"first": 24, "qkv": 8, "up": 40}),
        (Biased, "dim", {"first": 20, "q": 6}),
        (Biased, "head", {"first": 20, "q": 4}),
        (Literal, "dim", {"first": 32}),
        (Loop, "dim", {"cell": 20}),
        (Experts, "dim", {"down": 20, "gate_up": 16}),
        (Messages, "dim", {"first": 20, "message": 24}),
        (Maps, "dim", {"first": 12}),
        (Functional, "dim", {"first": 6}),
        (TalkingHeads, "dim", {"first": 20, "q": 6, "v": 6}),
    ],
)
def test_everything_that_can_be_removed_is_free_and_exact(kind, heads, groups) -> None:
    net, x, graph = traced(kind, heads)
    assert free(graph) == groups
    kept = {g.name: torch.arange(g.width) % 3 > 0 for g in graph.groups if g.reason is None and g.width > 1}
    small = copy.deepcopy(net)
    cut(small, graph.kept_positions(kept), attributes=graph.attributes(small, kept))
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for group in (group for group in graph.groups if group.name in kept):
        for member in group.members:
            gone = member.index[~kept[group.name]].reshape(-1)
            tensors[member.tensor].data.index_fill_(member.dim, gone, 0.0)
    torch.testing.assert_close(small(x), net(x))
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in net.parameters())


def test_layers_of_the_users_own_reach_the_budget() -> None:
    net, x, _ = traced(GPT2)
    plan = prune_channels(net, x, MACs(0.4), widths=Widths(min_channels=1))
    assert plan.after <= 0.4 * plan.before
    assert (net.up.nf, net.qkv.nf, net.split_size) == (
        net.up.bias.numel(),
        net.qkv.bias.numel(),
        net.out.weight.shape[0],
    )


def test_a_number_that_is_not_read_for_a_size_keeps_its_value() -> None:
    class Two(Transposed):
        def __init__(self) -> None:
            super().__init__(6, 24)
            self.buckets, self.head = 24, nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(super().forward(x)) + self.buckets

    net, x, _ = traced(Two)
    prune_channels(net, x, MACs(0.5))
    assert (net.nf, net.buckets) == (12, 24)


def test_the_reason_for_one_channel_per_group_of_a_norm_names_the_norm() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(16, 16), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1))
    plan = prune_channels(net, torch.randn(2, 3, 6, 6), MACs(0.9), dry_run=True)
    assert plan.skipped["0"].startswith("its 16 channels can only be removed together: a norm over groups")
