"""Time one pruning event with its optimizer state against torch-pruning's own ``step()`` without one.

    python benchmarks/surgery.py [--nets ResNet-18 ...] [--rounds 5] [--threads 1]

Both remove 30 % of every layer's channels by L2 norm, from a network whose dependencies are known: both graphs
are built before the measurement, and their times are in columns of their own. Ours also slices the gradients and both
moments of AdamW; torch-pruning slices the gradients and leaves the optimizer as it was. The rounds alternate; a ratio
is that of the medians.
"""

import argparse
import statistics
import time
import warnings

import torch
import torch_pruning as tp
from imagenet_nets import NETS
from torch import nn

import lightning_light as ll
from lightning_light.dependency import trace_dependencies
from lightning_light.structured import Local

FRACTION = 0.3


def prepared(name: str) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    """A network after one step of AdamW: gradients and two moments per weight."""
    torch.manual_seed(0)
    model, example = NETS[name](), torch.randn(2, 3, 224, 224)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer, example


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """The attention layers, which torch-pruning has to be given."""
    layers = ("query", "key", "value")
    return {getattr(m, n): m.heads for m in model.modules() if hasattr(m, "heads") for n in layers}


def torch_pruning(name: str) -> tuple[float, float]:
    """Seconds to build the graph, and of ``step()``."""
    model, _, example = prepared(name)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    started = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=FRACTION,
        ignored_layers=[last],
        num_heads=heads_of(model),
        in_channel_groups={},
        out_channel_groups={},
    )
    built = time.perf_counter()
    pruner.step()
    return built - started, time.perf_counter() - built


def ours(name: str) -> tuple[float, float]:
    """Seconds to trace the dependencies, and of the event with its optimizer."""
    model, optimizer, example = prepared(name)
    started = time.perf_counter()
    graph = trace_dependencies(model, (example,))
    traced = time.perf_counter()
    budget = ll.Channels(1.0 - FRACTION)
    ll.prune_channels(model, example, budget, ranking=Local(), optimizers=[optimizer], graph=graph)
    return traced - started, time.perf_counter() - traced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="torch_pruning")
    print(f"torch {torch.__version__}, torch-pruning {tp.__version__}, {args.threads} thread(s), {args.rounds} rounds")
    print("| network | torch-pruning: graph | `step()` | ours: tracing | event | event / `step()` |")
    print("|---|---|---|---|---|---|")
    for name in args.nets:
        runs: dict[str, list[tuple[float, float]]] = {"theirs": [], "ours": []}
        for number in range(args.rounds + 1):
            for key, run in (("theirs", torch_pruning), ("ours", ours)):
                seconds = run(name)
                if number:  # the first round warms up
                    runs[key].append(seconds)
        graph, step = (statistics.median(column) for column in zip(*runs["theirs"], strict=True))
        tracing, event = (statistics.median(column) for column in zip(*runs["ours"], strict=True))
        cells = [f"{graph:.3f} s", f"{step:.3f} s", f"{tracing:.3f} s", f"{event:.3f} s", f"{event / step:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
