"""Which networks can be pruned: the zoo of the tests, one trap each, by torch-pruning and by this package.

    python benchmarks/coverage.py

Half of the channels of every prunable layer leave. A network counts as pruned if it still runs, gives outputs of the
same shape, and has fewer parameters; that it is also the right network is what tests/graph checks. torch-pruning is
told which layers make the output, and nothing else.
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
from lightning_light.dependency.trace import leaf_tensors
from tests.zoo import ZOO

BREAKS = (RuntimeError, ValueError, IndexError, AssertionError, AttributeError, TypeError, KeyError, ZeroDivisionError)


def shapes(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, ...]]:
    """Of all outputs."""
    with torch.no_grad():
        return [tuple(tensor.shape) for tensor in leaf_tensors(net.eval()(*args, **kwargs))]


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
    pruning = ll.StructuredPruning(ll.Channels(0.5), ranking=ll.Local(), min_channels=1)
    ll.prune_channels(net, args, kwargs, pruning=pruning)


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
        return f"breaks: {str(error).splitlines()[0][:70]}" if str(error) else f"breaks: {type(error).__name__}"
    if found != expected:
        return f"outputs change from {expected} to {found}"
    return "nothing leaves" if size(net) == before else f"{size(net) / before:.2f} of the parameters"


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
