"""Count the networks that torch-pruning and this package can prune: the small networks of the tests, one trap each.

    python benchmarks/coverage.py

Half of the channels of every prunable layer are removed. A network counts as pruned if it still runs, gives outputs of
the same shape, and has fewer parameters; that it is also the right network is what tests/dependency checks.
torch-pruning is given the layers that produce the output, and nothing else.
"""

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning_light as ll
from lightning_light.dependency import trace_dependencies
from lightning_light.example_input import ExampleInput
from lightning_light.nested import tensors_in
from lightning_light.structured import Local, Widths
from tests.zoo import ZOO

BREAKS = (RuntimeError, ValueError, IndexError, AssertionError, AttributeError, TypeError, KeyError, ZeroDivisionError)


def shapes(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, ...]]:
    """Of all outputs."""
    with torch.no_grad():
        return [tuple(tensor.shape) for tensor in tensors_in(net.eval()(*args, **kwargs), objects=True)]


def size(net: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def theirs(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """torch-pruning, half of every layer."""
    graph = trace_dependencies(net, args, kwargs)
    makers = {group.name.partition("#")[0] for group in graph.groups if "output" in (group.reason or "")}
    example: Any = kwargs or (args if len(args) > 1 else args[0])
    pruner = tp.pruner.BasePruner(
        net,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[net.get_submodule(name) for name in makers],
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()


def ours(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """This package, half of all channels that may leave."""
    example = ExampleInput(args, kwargs)
    ll.prune_channels(net, example, ll.Channels(0.5), ranking=Local(), widths=Widths(min_channels=1))


def verdict(name: str, prune: Any) -> str:
    """What became of one network."""
    torch.manual_seed(0)
    net = ZOO[name]()
    args, kwargs = net.example
    before, expected = size(net), shapes(net, args, kwargs)
    net = copy.deepcopy(net)
    try:
        prune(net, args, kwargs)
        found = shapes(net, args, kwargs)
    except BREAKS as error:
        return f"fails: {str(error).splitlines()[0][:70]}" if str(error) else f"fails: {type(error).__name__}"
    if found != expected:
        return f"outputs change from {expected} to {found}"
    return "nothing is removed" if size(net) == before else f"{size(net) / before:.2f} of the parameters"


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, torch-pruning {tp.__version__}")
    print("| network | torch-pruning | lightning_light |\n|---|---|---|")
    right = {"theirs": 0, "ours": 0}
    for name in sorted(ZOO):
        cells = {"theirs": verdict(name, theirs), "ours": verdict(name, ours)}
        for key, cell in cells.items():
            right[key] += cell.endswith("of the parameters")
        print(f"| {name} | {cells['theirs']} | {cells['ours']} |")
    print(f"| **pruned, of {len(ZOO)}** | {right['theirs']} | {right['ours']} |")


if __name__ == "__main__":
    main()
