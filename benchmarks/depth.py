"""Remove residual blocks of a CIFAR-10 ResNet, beside channels at the same MACs and at the same measured latency.

    python benchmarks/depth.py --data cifar10.npz --weights resnet56_cifar10.pt --depth 56 --remaining 0.67

No training; blocks are scored and batch-norm statistics corrected on 8 batches of 32 training images. Latency: of the
ONNX file, one thread, the median of 5 measurements in turns, over the dense network's.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from statistics import median

import lightning as L
import torch
from cifar_resnet import EXAMPLE, accuracy, macs, read
from nets import cifar_resnet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll
from lightning_light.depth import BlockInfluence, OutputChange


def latencies(nets: dict[str, nn.Module]) -> dict[str, float]:
    """Median latency of each network's ONNX file in ONNX Runtime, measured in turns."""
    found: dict[str, list[float]] = {name: [] for name in nets}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(5):
            for number, (name, net) in enumerate(nets.items()):
                path = Path(folder) / f"{number}.onnx"
                report = ll.export_model(net, EXAMPLE, path, latency_runs=50)
                found[name].append(report.latency.median)
    return {name: median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--remaining", type=float, default=0.67)
    parser.add_argument("--test-images", type=int, default=10_000)
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)
    data = read(args.data)
    test = TensorDataset(*(tensor[: args.test_images] for tensor in data["test"].tensors))
    net = cifar_resnet(args.depth).eval()
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    nets, budget = {"dense": net}, ll.MACs(args.remaining)
    batches = [x for (x, _), _ in zip(DataLoader(data["train"], 32, shuffle=True), range(8), strict=False)]
    for criterion in (OutputChange(), BlockInfluence()):
        nets[f"blocks, {type(criterion).__name__}"] = copy.deepcopy(net)
        plan = ll.prune_blocks(
            nets[f"blocks, {type(criterion).__name__}"], EXAMPLE, budget, criterion=criterion, data=batches
        )
        print(f"{type(criterion).__name__}: removed {', '.join(plan.removed)}", flush=True)
    nets["channels, Magnitude"] = copy.deepcopy(net)
    ll.prune_channels(nets["channels, Magnitude"], EXAMPLE, budget, data=batches)
    times, dense = latencies(nets), macs(net)
    print("| | MACs | latency | test accuracy |\n|---|---|---|---|")
    for name, pruned in nets.items():
        row = f"{macs(pruned) / dense:.3f} | {times[name] / times['dense']:.2f} | {accuracy(pruned, test):.2%}"
        print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
