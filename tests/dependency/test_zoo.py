"""Every network of the zoo: coupled channels are found, and any of them can be removed."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_light.dependency import ChannelGroup, DependencyGraph, trace_dependencies
from lightning_light.surgery.edit import cut, trial
from tests.zoo import ZOO, Net

# A channel that is zero still counts in a mean over channels; a head of fewer positions has another temperature; a
# weight that is divided by its norm grows when inputs leave.
MIXES = {
    "attention",
    "convnext",
    "encoder",
    "fused_qkv",
    "group_norm",
    "tied_embedding",
    "weight_norm",
    "weight_norm_hook",
}

# In the others, nothing is split into heads: `test_heads_make_no_difference_elsewhere`.
WITH_HEADS = ["attention", "encoder", "fused_qkv"]
ROWS = [*((name, "dim") for name in ZOO), *((name, "head") for name in WITH_HEADS)]


def built(name: str) -> tuple[Net, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    net = ZOO[name]()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
    return net, *net.example


@functools.cache
def graph_of(name: str, heads: str) -> DependencyGraph:
    """The graph of a new network; it refers to none."""
    net, args, kwargs = built(name)
    return trace_dependencies(net, args, kwargs, heads=heads)


def prunable(graph: DependencyGraph) -> list[ChannelGroup]:
    return [group for group in graph.groups if group.reason is None]


def random_masks(graph: DependencyGraph, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in prunable(graph):
        masks[group.name] = torch.rand(group.width, generator=generator) < 0.5
        masks[group.name][int(torch.randint(group.width, (1,), generator=generator))] = True
    return masks


def outputs_of(net: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        out = net.eval()(*args, **kwargs)
    return list(out.values()) if isinstance(out, dict) else [out]


@torch.no_grad()
def silence(net: nn.Module, graph: DependencyGraph, masks: dict[str, Tensor]) -> None:
    """Set the parameters of removed channels to zero."""
    parameters = dict(net.named_parameters())
    for group in prunable(graph):
        for member in group.members:
            if member.role in {"out", "norm", "bias"} and member.tensor in parameters:
                removed = member.index[~masks[group.name]].reshape(-1)
                parameters[member.tensor].index_fill_(member.dim, removed, 0.0)


def whole(graph: DependencyGraph) -> Any:
    """All of a graph, in plain types."""
    groups = [
        (g.name, g.width, g.reason, g.roots.tolist(), [(m.tensor, m.dim, m.role, m.index.tolist()) for m in g.members])
        for g in graph.groups
    ]
    return groups, repr(graph.size_attributes), graph.shapes


@pytest.mark.parametrize("name", [name for name in ZOO if name not in WITH_HEADS])
def test_heads_make_no_difference_elsewhere(name) -> None:
    assert whole(graph_of(name, "head")) == whole(graph_of(name, "dim"))


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"tied_embedding"}))  # where what reads tokens says it first
def test_the_network_output_is_protected(name) -> None:
    assert any(group.reason == "produces the model output" for group in graph_of(name, "dim").groups)


@pytest.mark.parametrize(("name", "heads"), ROWS)
def test_any_channels_of_a_prunable_group_can_be_removed(name, heads) -> None:
    graph, (net, args, kwargs) = graph_of(name, heads), built(name)
    assert prunable(graph), "every net of the zoo has something to prune"
    before = outputs_of(net, args, kwargs)
    for seed in range(3):
        masks = random_masks(graph, seed)
        small, dense = copy.deepcopy(net), copy.deepcopy(net)
        cut(small, graph.kept_positions(masks), attributes=graph.attributes(small, masks))
        after = outputs_of(small, args, kwargs)
        assert [value.shape for value in after] == [value.shape for value in before]
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
        silence(dense, graph, masks)
        if name not in MIXES:
            for value, expected in zip(after, outputs_of(dense, args, kwargs), strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "heads"), ROWS)
def test_a_cut_network_trains_and_is_traced_again(name, heads) -> None:
    graph, (net, args, kwargs) = graph_of(name, heads), built(name)
    masks = random_masks(graph, 7)
    cut(net, graph.kept_positions(masks), attributes=graph.attributes(net, masks))
    net.train()
    out = net(*args, **kwargs)
    sum(value.sum() for value in (out.values() if isinstance(out, dict) else [out])).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in net.parameters())
    again = trace_dependencies(net, args, kwargs, heads=heads)
    wide = {g.name: int(masks[g.name].sum()) for g in prunable(graph) if int(masks[g.name].sum()) > 1}
    found = {group.name: group.width for group in prunable(again)}
    assert {name: found.get(name) for name in wide} == wide, "names and widths are those after the cut"


@pytest.mark.parametrize(("name", "heads"), ROWS)
def test_the_graph_after_a_cut_equals_a_new_trace(name, heads) -> None:
    graph, (net, args, kwargs) = graph_of(name, heads), built(name)
    masks = {
        g.name: torch.arange(g.width) % 2 == 0 if g.width > 3 else torch.ones(g.width) > 0 for g in prunable(graph)
    }
    cut(net, graph.kept_positions(masks), attributes=graph.attributes(net, masks))
    known, found = graph.after_pruning(masks), trace_dependencies(net, args, kwargs, heads=heads)
    assert known.fits(net)
    assert not graph.fits(net)
    assert table(known) == table(found)


def table(graph: DependencyGraph) -> dict[str, Any]:
    return {
        group.name: (group.width, sorted((m.tensor, m.dim, m.role, m.index.tolist()) for m in group.members))
        for group in prunable(graph)
    }


@pytest.mark.parametrize("name", list(ZOO))
def test_every_position_is_in_one_group_alone(name) -> None:
    graph = graph_of(name, "dim")
    places = [
        (member.tensor, member.dim, position)
        for group in graph.groups
        for member in group.members
        for position in member.index.reshape(-1).tolist()
    ]
    assert len(set(places)) == len(places)
    assert len({group.name for group in graph.groups}) == len(graph.groups)


@pytest.mark.parametrize("name", list(ZOO))
def test_tracing_changes_nothing_and_is_deterministic(name) -> None:
    net, args, kwargs = built(name)
    net.train()
    handle = net.register_forward_hook(lambda *_: None)
    next(net.children()).eval()
    next(net.parameters()).requires_grad_(False)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    objects = [(n, id(t), t.data_ptr(), t.clone()) for n, t in [*net.named_parameters(), *net.named_buffers()]]
    modes = {
        n: (m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for n, m in net.named_modules()
    }
    grads, learning = [p.grad for p in net.parameters()], [p.requires_grad for p in net.parameters()]
    random = torch.get_rng_state()
    found = trace_dependencies(net, args, kwargs)
    assert whole(found) == whole(graph_of(name, "dim")), "and is deterministic, whatever the modes and gradients"
    for (n, i, pointer, value), (m, tensor) in zip(
        objects, [*net.named_parameters(), *net.named_buffers()], strict=True
    ):
        assert (n, i, pointer) == (m, id(tensor), tensor.data_ptr())
        assert torch.equal(value, tensor)
    assert modes == {
        n: (m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for n, m in net.named_modules()
    }
    assert all(a is b.grad for a, b in zip(grads, net.parameters(), strict=True))
    assert learning == [p.requires_grad for p in net.parameters()]
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled()
    handle.remove()


@pytest.mark.parametrize("name", list(ZOO))
def test_groups_have_the_same_names_with_other_weights(name) -> None:
    first, (net, args, kwargs) = graph_of(name, "dim"), built(name)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
        assert list(table(trace_dependencies(net, args, kwargs))) == list(table(first))


def test_a_trial_cut_of_every_group_gives_the_shapes() -> None:
    net, args, kwargs = built("residual")
    graph = trace_dependencies(net, args, kwargs)
    masks = random_masks(graph, 0)
    with trial(net, graph.kept_positions(masks), graph.attributes(net, masks)):
        assert outputs_of(net, args, kwargs)[0].shape == (2, 5)
