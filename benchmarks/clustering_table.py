"""A ResNet of few weight values, without any training: accuracy, and the size of the file.

    python benchmarks/clustering_table.py --data cifar10.npz --weights resnet20_cifar10.pt

``--data`` and ``--weights`` are as for ``benchmarks/cifar_resnet.py``.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from cifar_resnet import accuracy, read
from nets import cifar_resnet
from torch import nn

from lightning_light.clustering import load_clustered, save_clustered
from lightning_light.clustering.kmeans import cluster


def clustered(net: nn.Module, clusters: int) -> nn.Module:
    """A copy in which every layer has as many values."""
    net = copy.deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            values = layer.weight.detach().reshape(1, -1)
            centroids, places = cluster(values, clusters, initialization="linear", zeros=False)
            layer.weight.data = centroids.gather(1, places).reshape(layer.weight.shape)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    test = torch.utils.data.TensorDataset(*(tensor[: args.images] for tensor in read(args.data)["test"].tensors))
    net = cifar_resnet(args.depth)
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    print(f"ResNet-{args.depth}, CIFAR-10, {args.images} test images\n\n| | test accuracy | file | bits a weight |")
    print("|---|---|---|---|")
    for name, made in (("dense", net), *((f"{count} values a layer", clustered(net, count)) for count in (32, 16, 8))):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.llwc"
            rows = [row for row in save_clustered(made, path) if row.name.endswith("weight") and row.weights > 64]
            size, state = path.stat().st_size, load_clustered(path)
        bits = sum(row.bits * row.weights for row in rows) / sum(row.weights for row in rows)
        made.load_state_dict(state)
        print(f"| {name} | {accuracy(made, test):.2%} | {size / 1e3:.0f} kB | {bits:.2f} |", flush=True)


if __name__ == "__main__":
    main()
