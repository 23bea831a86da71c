"""Compare the groups with torch-pruning's, position by position, where it can trace the network too."""

import copy
from typing import Any

import pytest
import torch
import torch_pruning
from torch import Tensor, nn

from lightning_light.dependency import trace_dependencies
from tests.zoo import ZOO

NETS = [
    "batch_norm_free",
    "chunk",
    "concat",
    "control_flow",
    "depthwise",
    "plain",
    "prelu",
    "reshape_flatten",
    "residual",
    "squeeze_excite",
    "transposed",
    "unet",
]


def tagged(model: nn.Module) -> nn.Module:
    """A copy in which every number says where it was."""
    copied = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in [*copied.parameters(), *copied.buffers()]:
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    return copied


def left_of(model: nn.Module, original: nn.Module) -> dict[str, dict[int, list[int]]]:
    """Tensor -> dimension -> positions that are left, where some have gone."""
    found: dict[str, dict[int, list[int]]] = {}
    for (name, tensor), before in zip(named(model), [t for _, t in named(original)], strict=True):
        if tensor.shape != before.shape:
            coordinates = torch.unravel_index(tensor.detach().long(), before.shape)
            for dim, positions in enumerate(coordinates):
                stays = sorted(set(positions.reshape(-1).tolist()))
                if len(stays) < before.shape[dim]:
                    found.setdefault(name, {})[dim] = stays
    return found


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, t) for n, t in [*model.named_parameters(), *model.named_buffers()] if t.dim()]


def theirs(net: nn.Module, layer: str, channels: list[int], args: Any) -> dict[str, dict[int, list[int]]]:
    copied = tagged(net)
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(copied, tuple(arg.double() for arg in args))
    module = copied.get_submodule(layer)
    group = graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, idxs=channels)
    group.prune()
    return left_of(copied, net)


@pytest.mark.filterwarnings("ignore")  # torch-pruning's own
@pytest.mark.parametrize("name", NETS)
def test_the_same_positions_are_removed(name) -> None:
    net = ZOO[name]()
    args, kwargs = net.example
    graph = trace_dependencies(net, args, kwargs)
    compared = 0
    for group in graph.groups:
        maker = next((m for m in group.members if m.role == "out"), None)
        if group.reason is None and maker is not None:
            layer = maker.tensor.rpartition(".")[0]
            for channel in (0, group.width - 1):
                mask = torch.arange(group.width) != channel
                mine = {
                    tensor: {dim: index.tolist() for dim, index in dims.items()}
                    for tensor, dims in graph.kept_positions({group.name: mask}).items()
                }
                assert mine == theirs(net, layer, maker.index[channel].tolist(), args), (layer, channel)
                compared += 1
    assert compared
