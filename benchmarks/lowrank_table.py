"""Factorize to half of the multiply-accumulates: accuracy, and latency of the exported file relative to the dense one.

    python benchmarks/lowrank_table.py cnn
    python benchmarks/lowrank_table.py resnet --data cifar10.npz --weights resnet20_cifar10.pt

``cnn`` is the network of ``examples/01_prune_and_export.py`` on the part of Fashion-MNIST that ships with the examples;
``resnet`` is a published ResNet-20 on CIFAR-10, fine-tuned for a few epochs. ``--data`` and ``--weights`` are as for
``benchmarks/cifar_resnet.py``.
"""

import argparse
import copy
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from cifar_resnet import Classifier, accuracy, read
from nets import cifar_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_light.budgets import MACs, Params
from lightning_light.export import TorchScriptLite, export_model
from lightning_light.lowrank import LowRankFactorization, RankAllocation, WhitenedSVD, factorize
from lightning_light.measure import count_cost, measure_latency
from lightning_light.schedules import OneShot

EXAMPLES = Path(__file__).parents[1] / "examples"
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def exported(net: nn.Module, example: Tensor) -> Callable[[], object]:
    """Return a call of the exported file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.ptl"
        export_model(net, (example,), path, latency_runs=1)
        run = TorchScriptLite().load(path)
    return lambda: run(example)


def speed(dense: nn.Module, other: nn.Module, example: Tensor) -> tuple[float, float]:
    """Return milliseconds of both exported files: the best of twelve alternating turns, against other load."""
    runs = [exported(net, example) for net in (dense, other)]
    turns = [[measure_latency(run, warmup=3, runs=15, threads=1).p10 for run in runs] for _ in range(12)]
    first, second = (min(turn[place] for turn in turns) * 1e3 for place in (0, 1))
    return first, second


def macs(net: nn.Module, example: Tensor) -> float:
    return count_cost(net, (example,)).macs / 1e6


def row(name: str, right: list[float], net: nn.Module, dense: nn.Module, example: Tensor) -> None:
    """Print accuracy over the seeds, cost, and latency relative to the dense network."""
    before, after = speed(dense, net, example)
    mean, spread = statistics.mean(right), statistics.stdev(right) if len(right) > 1 else 0.0
    cells = [
        f"{mean:.2%} ± {spread:.2%}" if len(right) > 1 else f"{mean:.2%}",
        f"{macs(net, example):.2f} M",
        f"{sum(p.numel() for p in net.parameters()):,}",
        f"{after:.3f} ms",
        f"{after / before:.2f}",
    ]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def head(title: str) -> None:
    print(f"{title}, torch {torch.__version__}, 1 thread\n")
    print("| | test accuracy | MACs | parameters | exported, one sample | / dense |\n|---|---|---|---|---|---|")


def resnet(args: argparse.Namespace) -> None:
    data, example = read(args.data), torch.zeros(1, 3, 32, 32)
    net = cifar_resnet(args.depth)
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    head(f"ResNet-{args.depth}, CIFAR-10, {args.epochs} epochs of {args.images} images, round_to={args.round_to}")
    if "tuned" in args.parts:
        fine_tuned(net, data, example, args)
    if "one_shot" in args.parts:
        one_shot(net, data, example, args)
    if "depthwise" in args.parts:
        depthwise(net, data, example)


def one_shot(net: nn.Module, data: dict[str, TensorDataset], example: Tensor, args: argparse.Namespace) -> None:
    row("dense", [accuracy(net, data["test"])], net, net, example)
    calibration = DataLoader(TensorDataset(data["train"].tensors[0][:1024]), 128)
    allocation = RankAllocation(round_to=args.round_to)
    for form in ("channel", "spatial", "tucker2", "auto"):
        factorized = copy.deepcopy(net).eval()
        factorize(factorized, example, MACs(args.remaining), form=form, allocation=allocation)
        row(f"one shot, `form={form!r}`", [accuracy(factorized, data["test"])], factorized, net, example)
    factorized = copy.deepcopy(net).eval()
    factorize(factorized, example, MACs(args.remaining), fit=WhitenedSVD(), data=calibration, allocation=allocation)
    row("one shot, `fit=WhitenedSVD()`", [accuracy(factorized, data["test"])], factorized, net, example)


def depthwise(net: nn.Module, data: dict[str, TensorDataset], example: Tensor) -> None:
    """Decouple all 3x3 layers but the first."""
    kernels = [name for name, module in net.named_modules() if getattr(module, "kernel_size", None) == (3, 3)]
    calibration = DataLoader(TensorDataset(data["train"].tensors[0][:8192]), 128)
    for name, options in (
        ("without data", {}),
        ("statistics of batch norms corrected", {"data": calibration, "calibration_batches": 64}),
    ):
        decoupled = copy.deepcopy(net).eval()
        factorize(decoupled, example, Params(0.534), form="depthwise", targets=kernels[1:], **options)
        title = f"one shot, `form='depthwise'`, `Params(0.534)`, {name}"
        row(title, [accuracy(decoupled, data["test"])], decoupled, net, example)


def fine_tuned(net: nn.Module, data: dict[str, TensorDataset], example: Tensor, args: argparse.Namespace) -> None:
    train = TensorDataset(*(tensor[: args.images] for tensor in data["train"].tensors))
    right = []
    for seed in range(args.seeds):
        L.seed_everything(seed, verbose=False)
        module = Classifier(copy.deepcopy(net), args.lr).train().to(memory_format=torch.channels_last)
        method = LowRankFactorization(
            MACs(args.remaining), form=args.form, allocation=RankAllocation(round_to=args.round_to)
        )
        trainer = L.Trainer(max_epochs=args.epochs, callbacks=[method], precision=args.precision, **QUIET)
        trainer.fit(module, DataLoader(train, 128, shuffle=True, drop_last=True))
        right.append(accuracy(module.net, data["test"]))
        print(f"seed {seed}: {right[-1]:.2%}", file=sys.stderr, flush=True)
    row(f"fine-tuned, `form={args.form!r}`, {args.seeds} seeds", right, module.net, net, example)


def example_module(name: str) -> Any:
    """Import a file of ``examples/`` as a module."""
    spec = importlib.util.spec_from_file_location(name.partition("_")[2], EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))
    spec.loader.exec_module(module)
    return module


def cnn(args: argparse.Namespace) -> None:
    job, example = example_module("01_prune_and_export"), torch.zeros(1, 1, 28, 28)
    head(f"CNN of examples/01, Fashion-MNIST 10k, {args.epochs} epochs, round_to={args.round_to}")
    settings: dict[str, Callable[[], list[Any]]] = {
        "dense": list,
        **{
            f"factorized at half of the run, `form={form!r}`": lambda form=form: [
                LowRankFactorization(
                    MACs(args.remaining),
                    schedule=OneShot(at=0.5),
                    form=form,
                    allocation=RankAllocation(round_to=args.round_to),
                )
            ]
            for form in args.forms
        },
    }
    dense = None
    for name, build in settings.items():
        right = []
        for seed in range(args.seeds):
            L.seed_everything(seed, verbose=False)
            module, data = job.Classifier(), job.FashionMNIST(None)
            trainer = L.Trainer(max_epochs=args.epochs, callbacks=build(), **QUIET)
            trainer.fit(module, datamodule=data)
            (metrics,) = trainer.test(module, datamodule=data, verbose=False)
            right.append(metrics["test_accuracy"])
        dense = dense or module
        row(f"{name}, {args.seeds} seeds", right, module, dense, example)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cnn", "resnet"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--remaining", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000, help="training images per epoch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--precision", default="32-true", help="precision of the fine-tuning, as in Lightning")
    parser.add_argument("--form", default="auto")
    parser.add_argument("--forms", nargs="+", default=["auto", "spatial"], help="for the rows of the cnn")
    parser.add_argument("--parts", nargs="+", default=["one_shot", "tuned"], help="of the table of the resnet")
    parser.add_argument("--round_to", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cnn(args) if args.what == "cnn" else resnet(args)


if __name__ == "__main__":
    main()
