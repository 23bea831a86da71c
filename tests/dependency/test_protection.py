"""Protected channels, and the reasons that are shown to the user."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.dependency import ChannelGroup, trace_dependencies
from lightning_light.errors import TraceError
from lightning_light.surgery.edit import cut
from tests.zoo import ZOO, noise


def groups_of(model: nn.Module, *args: Any, **options: Any) -> dict[str, ChannelGroup]:
    groups = trace_dependencies(model, args, **options).groups
    makers = [group for group in groups if any(member.role == "out" for member in group.members)]
    return {group.name.partition("#")[0]: group for group in makers}


def reason(model: nn.Module, name: str, *args: Any) -> str:
    found = groups_of(model, *args)[name].reason
    assert found is not None, f"{name} is not protected"
    return found


class Literal(nn.Module):
    """A size that is written down: what the hidden layer makes is reshaped to 4 x 6."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.free, self.fc = nn.Linear(5, 24), nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.hidden(x)).reshape(-1, 4, 6)
        return self.fc(F.relu(self.free(x)))


def test_a_size_fixed_in_the_code_protects_its_channels() -> None:
    model = Literal()
    found = groups_of(model, torch.randn(2, 5))
    assert "is read by code with a fixed size" in str(found["hidden"].reason)
    assert found["free"].reason is None
    assert found["free"].width == 9


class WidthTied(nn.Module):
    """Attention as in many repositories: heads are ``width // heads`` wide, by the width of what comes in."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.split = heads
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        shape = (n, length, self.split, width // self.split)
        q, k, v = (layer(x).reshape(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        return self.out(y)


class Around(nn.Module):
    """Something before the attention and something after it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.fc = nn.Linear(3, 12), WidthTied(), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(F.relu(self.embed(x))).mean(1))


def test_attention_as_wide_as_its_input_shrinks_with_it() -> None:
    model, x = Around(), torch.randn(2, 5, 3)
    graph = trace_dependencies(model, (x,))
    free = {group.name: group for group in graph.groups if group.reason is None}
    assert "embed" in free, [(group.name, group.reason) for group in graph.groups]
    masks = {name: torch.arange(group.width) > 0 for name, group in free.items()}
    cut(model, graph.kept_positions(masks), attributes=graph.attributes(model, masks))
    assert model(x).shape == (2, 4)
    attention = model.attention
    assert model.embed.out_features == attention.q.in_features == attention.q.out_features < 12


def test_attention_written_out_in_a_larger_forward_is_protected() -> None:
    class Inline(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(WidthTied.forward(self.attention, F.relu(self.embed(x))).mean(1))

    model, x = Inline(), torch.randn(2, 5, 3)
    found = groups_of(model, x)
    assert found["attention.q"].reason
    assert found["attention.v"].reason
    assert found["embed"].reason
    assert found["attention.out"].reason is None


class Unknown(nn.Module):
    """A sorting of channels, a product over them, a transform: where a channel goes cannot be followed."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.second(self.operation(self.first(x)))))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sort(dim=-1).values,
        lambda x: torch.fft.rfft(x, dim=-1, n=14).real,
        lambda x: x.flip(-1).cummax(-1).values,
        lambda x: x @ torch.linalg.pinv(x) @ x,
    ],
    ids=["sort", "rfft", "cummax", "pinv"],
)
def test_an_operation_without_a_rule_protects_its_input(operation) -> None:
    model = Unknown(operation)
    found = groups_of(model, torch.randn(2, 4))
    assert found["first"].reason
    assert found["second"].reason is None


def test_a_constant_protects_what_it_is_added_to() -> None:
    model = Unknown(lambda x: x + torch.arange(8.0))
    assert "fixed size" in reason(model, "first", torch.randn(2, 4))


def test_the_input_is_never_pruned() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + self.first(x))

    assert "fixed size" in reason(Skip(), "first", torch.randn(2, 4))


def test_zero_padding_protects_what_it_is_added_to() -> None:
    net = ZOO["padded_shortcut"]()
    found = {g.name: g.reason for g in trace_dependencies(net, *net.example).groups}
    assert any(reason == "is added to zero-padded channels" for reason in found.values())
    assert any(reason is None for reason in found.values())


def test_layers_that_do_not_run_are_protected() -> None:
    net = ZOO["control_flow"]()
    found = {g.name: g.reason for g in trace_dependencies(net, *net.example).groups}
    assert "is not used by the forward pass" in {reason for name, reason in found.items() if name.startswith("narrow")}


def test_outputs_in_plain_objects_are_protected() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Output:
            return Output(self.fc(F.relu(self.first(x))))

    found = groups_of(Wrapped(), torch.randn(2, 4))
    assert found["fc"].reason == "produces the model output"
    assert found["first"].reason is None


@pytest.mark.parametrize("args", [(torch.randn(2, 7),), (), (torch.randn(2, 3, 8, 8), 1), ("text",)])
def test_an_input_that_does_not_fit_is_a_trace_error(args) -> None:
    with pytest.raises(
        TraceError, match=r"(?s)`Plain` does not run on the example input: .* Expected one forward pass"
    ):
        trace_dependencies(ZOO["plain"](), args)


def test_the_number_of_samples_does_not_matter() -> None:
    net = ZOO["residual"]()
    one, many = (trace_dependencies(net, (noise(n, 3, 8, 8),)) for n in (1, 5))
    assert [(g.name, g.width, g.reason) for g in one.groups] == [(g.name, g.width, g.reason) for g in many.groups]


def test_whole_heads_are_channels_of_their_own() -> None:
    net = ZOO["fused_qkv"]()
    args, kwargs = net.example
    by_head = {g.name: g for g in trace_dependencies(net, args, kwargs, heads="head").groups if g.reason is None}
    qkv = next(group for name, group in by_head.items() if name.startswith("qkv"))
    assert qkv.width == net.heads
    masks = {qkv.name: torch.tensor([True, False, True, True])}
    graph = trace_dependencies(net, args, kwargs, heads="head")
    cut(net, graph.kept_positions(masks), attributes=graph.attributes(net, masks))
    assert net.heads == 3
    assert net.qkv.out_features == 3 * 3 * 4
    assert net(*args).shape == (2, 5)


def test_positions_of_every_head_are_channels_of_their_own() -> None:
    net = ZOO["fused_qkv"]()
    args, kwargs = net.example
    graph = trace_dependencies(net, args, kwargs, heads="dim")
    groups = [g for g in graph.groups if g.reason is None and g.name.startswith("qkv")]
    assert {group.width for group in groups} == {4}, "the four positions of a head; query and key, and value"
    masks = {group.name: torch.tensor([True, False, True, True]) for group in groups}
    cut(net, graph.kept_positions(masks), attributes=graph.attributes(net, masks))
    assert net.heads == 4
    assert net.qkv.out_features == 3 * 4 * 3


@pytest.mark.parametrize("heads", ["dim", "head"])
def test_attributes_of_multihead_attention_follow_a_cut(heads) -> None:
    net = ZOO["attention"]()
    args, kwargs = net.example
    graph = trace_dependencies(net, args, kwargs, heads=heads)
    group = next(g for g in graph.groups if g.reason is None and any("attention" in m.tensor for m in g.members))
    masks = {group.name: torch.arange(group.width) > 0}
    cut(net, graph.kept_positions(masks), attributes=graph.attributes(net, masks))
    attention = net.attention
    assert attention.embed_dim == attention.num_heads * attention.head_dim == attention.out_proj.weight.shape[0] < 16
    assert (attention.num_heads, attention.head_dim) == ((4, 3) if heads == "dim" else (3, 4))
    assert net(*args).shape == (2, 5)


def test_many_reasons_are_distinguished() -> None:
    class Fixed(nn.Module):
        """The code expects one width, which is in the reason."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.width, self.up, self.down = [width], nn.Linear(4, width), nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            if [y.shape[-1]] != self.width:
                raise ValueError(f"expected {self.width[0]} channels")
            return x + self.down(y)

    net = nn.Sequential(*map(Fixed, range(5, 20)))
    groups = trace_dependencies(net, (torch.randn(2, 4),)).groups
    reasons = {group.width: group.reason for group in groups if group.width > 4}
    assert reasons == {n: f"is read by code with a fixed size (expected {n} channels)" for n in range(5, 20)}
