"""Compress a trained CIFAR-10 ResNet to one latency of its ONNX file by four methods, then train on.

    python -m benchmarks.equal_latency --data cifar10.npz --weights resnet20_cifar10.pt

The latency is that of the file without three residual blocks, relative to the dense file: in turns, as processor
time, which other processes of the machine affect little. The budget of each other method is found by bisection.
Training is in bfloat16, with the dense network as teacher. There is one JSON file per method and seed, and what is
there is not run again. The table is printed at the end.
"""

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_light as ll
from benchmarks.experiments.harness import RESULTS, session
from benchmarks.experiments.methods import top1
from benchmarks.experiments.tasks import QUIET, CIFARResNet
from lightning_light.atomic import atomic_write
from lightning_light.example_input import ExampleInput
from lightning_light.measure import count_cost
from lightning_light.measure.latency_table import LatencyTable
from lightning_light.substitution import DepthwiseSeparable, Fire

Call = Callable[[Tensor], Tensor]

THREE_BLOCKS = 0.66  # of the MACs
TOLERANCE = 0.015  # of the ratio
BISECTIONS, ROUNDS, BURST = 5, 40, 4


def blocks(net: nn.Module, remaining: float, batches: list[Tensor]) -> None:
    criterion = ll.depth.BlockInfluence()
    ll.prune_blocks(net, batches[0], ll.MACs(remaining), criterion=criterion, data=batches)


def channels(net: nn.Module, remaining: float, batches: list[Tensor]) -> None:
    ll.prune_channels(net, batches[0], ll.MACs(remaining), widths=ll.structured.Widths(round_to=8), data=batches)


def low_rank(net: nn.Module, remaining: float, batches: list[Tensor]) -> None:
    ll.factorize(net, batches[0], ll.MACs(remaining), form="spatial", data=batches)


def operators(net: nn.Module, remaining: float, batches: list[Tensor]) -> None:
    """Plan by the table of the runtime: multiply-accumulates mislead between kinds of operators."""
    table = LatencyTable.of(ll.Latency(1.0, runtime=ll.ONNX()))
    assert table is not None
    limit = remaining * table.file(net, ExampleInput((batches[0],)))
    lighter = [DepthwiseSeparable(1), Fire(0.25), Fire(0.5)]
    options: dict[str, Any] = {"operators": lighter, "fit_steps": 0, "progress_bar": False}
    ll.substitute_operators(net, batches[0], ll.Latency(limit, runtime=ll.ONNX()), data=batches, **options)


METHODS = {
    "DepthPruning": blocks,
    "StructuredPruning": channels,
    "LowRankFactorization": low_rank,
    "Substitution": operators,
}


class Study:
    """The dense network, its file, and the latency to reach."""

    def __init__(self, task: CIFARResNet, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.dense = task.trained(0)
        self._file = self._written(self.dense)

    def compressed(self, method: str, remaining: float, seed: int) -> nn.Module:
        """Compress a copy of the dense network, on training images drawn by ``seed``."""
        L.seed_everything(seed, verbose=False)
        net, batches = copy.deepcopy(self.dense), [images[:16] for images, _ in self.task.batches(8)]
        METHODS[method](net, remaining, batches)
        return net

    def ratio(self, net: nn.Module) -> float:
        """Latency of the file over that of the dense file: median over rounds of the fastest of a few calls each."""
        files, ratios = (self._written(net), self._file), []
        for number in range(ROUNDS):
            order = (0, 1) if number % 2 else (1, 0)
            seconds = {place: self._fastest(files[place]) for place in order}
            ratios.append(seconds[0] / seconds[1])
        return median(ratios)

    def budget(self, method: str) -> float:
        """Return the budget with which the file of ``method`` has the latency of the file without three blocks."""
        path = self.folder / "budgets.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if method not in found:
            if method == "DepthPruning":
                found |= {method: THREE_BLOCKS, "ratio": self.ratio(self.compressed(method, THREE_BLOCKS, 0))}
            else:
                found[method] = self._bisected(method, found["ratio"])
            _store(path, found)
        return float(found[method])

    def run(self, method: str, remaining: float, seed: int, epochs: int) -> dict[str, Any]:
        """Compress, train, and measure."""
        net = self.compressed(method, remaining, seed)
        before, started = top1(net.eval(), self.task), time.process_time()
        module = self.task.module(net).train().to(memory_format=torch.channels_last)
        if epochs:
            teacher = ll.KnowledgeDistillation(copy.deepcopy(self.dense))
            trainer = L.Trainer(max_epochs=epochs, precision="bf16-mixed", callbacks=[teacher], **QUIET)
            trainer.fit(module, self.task.train_loader())
        seconds = time.process_time() - started
        macs, dense = (count_cost(one, (self.task.example,)).macs for one in (net, self.dense))
        return {
            "settings": {"method": method, "remaining": remaining, "seed": seed, "epochs": epochs},
            "untrained": before,
            "accuracy": top1(net.eval(), self.task) if epochs else before,
            "ratio": self.ratio(net),
            "macs": macs / dense,
            "training_seconds": seconds,
        }

    def _bisected(self, method: str, target: float) -> float:
        low, high, tried = 0.2, 0.8, []
        for _ in range(BISECTIONS):
            remaining = (low + high) / 2
            try:
                ratio = self.ratio(self.compressed(method, remaining, 0))
            except ll.BudgetError:
                low = remaining
                continue
            print(f"{method} {remaining:.3f}: {ratio:.3f} of the dense latency", flush=True)
            tried.append((abs(ratio - target), remaining))
            if abs(ratio - target) <= TOLERANCE:
                break
            low, high = (low, remaining) if ratio > target else (remaining, high)
        return min(tried)[1]

    def _written(self, net: nn.Module) -> Call:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "network.onnx"
            ll.export_model(net.eval(), self.task.example, path, batch="any", latency_runs=1)
            return session(path)

    def _fastest(self, file: Call) -> float:
        file(self.task.example)
        seconds = []
        for _ in range(BURST):
            started = time.process_time()
            file(self.task.example)
            seconds.append(time.process_time() - started)
        return min(seconds)


def table(folder: Path, epochs: int) -> str:
    """Return the results as a table, with the mean and standard deviation over seeds."""
    lines = ["| method | latency | MACs | before training | test accuracy | seeds |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{method}-{epochs}-*.json"))]
        if results:
            shares = [f"{mean(one[key] for one in results):.2f}" for key in ("ratio", "macs")]
            accuracies = [_percent([one[key] for one in results]) for key in ("untrained", "accuracy")]
            lines.append("| " + " | ".join([f"`{method}`", *shares, *accuracies, str(len(results))]) + " |")
    return "\n".join(lines)


def _percent(values: list[float]) -> str:
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread} %"


def _store(path: Path, found: dict[str, Any]) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=1, help="of training; 0 for none")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS / "equal_latency")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    study = Study(CIFARResNet(args.depth, args.data, args.weights, lr=0.02), args.results)
    for seed in range(args.seeds):
        for method in args.methods:
            path = args.results / f"{method}-{args.epochs}-{seed}.json"
            if not path.exists():
                _store(path, study.run(method, study.budget(method), seed, args.epochs))
                print(path.read_text(), flush=True)
    print(table(args.results, args.epochs))


if __name__ == "__main__":
    main()
