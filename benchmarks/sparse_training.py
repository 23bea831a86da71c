"""Accuracy of sparse training on the Fashion-MNIST part of the examples: mean and spread over seeds, as Markdown.

python benchmarks/sparse_training.py --epochs 20 --seeds 3
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lightning_light as ll

EXAMPLES = Path(__file__).parents[1] / "examples"

NINETY = ll.Sparsity(0.9)
# In the first half of the run; the learning rate is not rewound, and has half of its course left for the last ticket.
TICKETS = ll.sparsity.Rewinding(
    ll.Window(ll.schedules.Staircase(ll.schedules.Exponential(2.302585), steps=5), end=0.5), rewind_to=0.02
)
GRADUAL = ll.Window(ll.Cubic(), start=0.1, end=0.7)
UPDATES = ll.Window(ll.schedules.Cosine(), start=0.0, end=0.75)
METHODS: dict[str, Callable[[int], list[Any]]] = {
    "dense": lambda seed: [],
    "gradual 90 %, global": lambda seed: [ll.WeightPruning(NINETY, schedule=GRADUAL, every_n_steps=20)],
    "static random 90 %, ERK": lambda seed: [dynamic(ll.sparsity.Static(), seed)],
    "SET 90 %, ERK": lambda seed: [dynamic(ll.sparsity.SET(), seed)],
    "RigL 90 %, ERK": lambda seed: [dynamic(ll.RigL(), seed)],
    "SRigL 90 %, ERK": lambda seed: [dynamic(ll.sparsity.SRigL(), seed)],
    "AC/DC 90 %": lambda seed: [ll.WeightPruning(NINETY, schedule=ll.sparsity.Alternating(phases=4))],
    "lottery tickets 90 %, five rounds": lambda seed: [ll.WeightPruning(NINETY, schedule=TICKETS)],
    "2:4, SR-STE": lambda seed: [ll.SRSTE(ll.NM(2, 4), targets=ll.Targets(exclude="stem"))],
}


def dynamic(method: ll.sparsity.DynamicMethod, seed: int) -> ll.DynamicSparseTraining:
    return ll.DynamicSparseTraining(
        NINETY, method=method, criterion=ll.criteria.Random(seed), schedule=UPDATES, every_n_steps=50, seed=seed
    )


def example() -> Any:
    """The network and the training of ``examples/02_sparse_training.py``."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("sparse_training_example", EXAMPLES / "02_sparse_training.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    args.out = Path(tempfile.mkdtemp())
    torch.set_num_threads(1)
    train = example().train
    lines = []
    for name in args.methods:
        runs = [train(METHODS[name](seed), args, seed) for seed in range(args.seeds)]
        accuracies, report = [100 * accuracy for accuracy, _, _ in runs], runs[-1][1]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        lines.append(
            f"| {name} | {statistics.mean(accuracies):.2f} ± {spread:.2f} | {report.sparsity:.2%} | "
            f"{report.bytes / 1e3:.0f} kB | {report.deflated / 1e3:.0f} kB |"
        )
        print(lines[-1], [round(accuracy, 2) for accuracy in accuracies], flush=True)
    print("| method | test accuracy, % | sparsity | tensors | compressed |\n|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
