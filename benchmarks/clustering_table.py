"""Weight clustering of a ResNet, by k-means alone and trained: accuracy, and the size of the file.

    python benchmarks/clustering_table.py --data cifar10.npz --weights resnet20_cifar10.pt

Each row is fine-tuned for ``--epochs`` of ``--images`` images, with ``--clusters`` values per layer from the first step
on; without ``--epochs`` there is no training. ``--data`` and ``--weights`` are as for
``benchmarks/cifar_resnet.py``.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from cifar_resnet import Classifier, accuracy, read
from nets import cifar_resnet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_light.clustering import (
    DKM,
    CentroidTraining,
    StraightThroughEstimator,
    WeightClustering,
    cluster,
    load_clustered,
    save_clustered,
)

TRAINING = {"centroids": CentroidTraining(), "straight_through": StraightThroughEstimator(), "dkm": DKM()}
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def clustered(net: nn.Module, clusters: int) -> nn.Module:
    """Return a copy with as many values per layer, by k-means alone."""
    net = copy.deepcopy(net)
    cluster(net, None, clusters, preserve_sparsity=False)
    return net


def trained(net: nn.Module, clusters: int, train: TensorDataset, seed: int, args: argparse.Namespace) -> nn.Module:
    """Return a copy that is fine-tuned with clustered weights."""
    L.seed_everything(seed, verbose=False)
    module = Classifier(copy.deepcopy(net), args.lr).train()
    method = WeightClustering(clusters, start=0.0, training=TRAINING[args.training])
    trainer = L.Trainer(max_epochs=args.epochs, callbacks=[method], precision=args.precision, **QUIET)
    trainer.fit(module, DataLoader(train, 128, shuffle=True, drop_last=True))
    return module.net


def row(name: str, nets: list[nn.Module], test: TensorDataset) -> None:
    """Print the accuracy of the weights read from the file, its size, and the bits per weight."""
    right, sizes, bits = [], [], []
    for net in nets:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.safetensors"
            rows = [row for row in save_clustered(net, path) if row.name.endswith("weight") and row.weights > 64]
            sizes.append(path.stat().st_size / 1e3)
            net.load_state_dict(load_clustered(path))
        bits.append(sum(row.bits * row.weights for row in rows) / sum(row.weights for row in rows))
        right.append(accuracy(net, test))
        print(f"{name}: {right[-1]:.2%}", file=sys.stderr, flush=True)
    spread = f" ± {statistics.stdev(right):.2%}" if len(right) > 1 else ""
    size, width = statistics.mean(sizes), statistics.mean(bits)
    print(f"| {name} | {statistics.mean(right):.2%}{spread} | {size:.0f} kB | {width:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--clusters", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--training", choices=list(TRAINING), default="centroids")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--images", type=int, default=10_000, help="training images per epoch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = read(args.data)
    train = TensorDataset(*(tensor[: args.images] for tensor in data["train"].tensors))
    net = cifar_resnet(args.depth).to(memory_format=torch.channels_last)
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    print(f"ResNet-{args.depth}, CIFAR-10, torch {torch.__version__}\n\n| | test accuracy | file | bits per weight |")
    print("|---|---|---|---|")
    row("dense", [net], data["test"])
    for count in args.clusters:
        row(f"{count} values per layer, k-means alone", [clustered(net, count)], data["test"])
        if args.epochs:
            nets = [trained(net, count, train, seed, args) for seed in range(args.seeds)]
            row(f"{count} values per layer, trained, {args.seeds} seeds", nets, data["test"])


if __name__ == "__main__":
    main()
