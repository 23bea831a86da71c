"""Train a network of RepVGG blocks on Fashion-MNIST, merge it, and quantize it after training.

    python -m benchmarks.reparameterization_int8 [--epochs 3] [--seeds 3]

Three networks of the same merged structure: of published blocks, whose branches are each normalized and whose sum is
not; of convolutions before a batch norm, expanded by `Reparameterization`; and of the same without branches.
"""

import argparse
import copy
from pathlib import Path
from statistics import mean

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_light as ll
from benchmarks.experiments.methods import top1
from benchmarks.experiments.tasks import QUIET, FashionCNN
from lightning_light.reparameterization import Reparameterization, RepVGG

CALIBRATION_BATCHES = 8
QUANTIZED = {
    "one scale per layer": (False, False),
    "one scale per layer, equalized": (False, True),
    "one scale per channel": (True, False),
    "one scale per channel, equalized": (True, True),
}


class PublishedBlock(nn.Module):
    """3x3, 1x1 and identity, each with a batch norm; none behind the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(nn.Conv2d(inputs, outputs, k, stride, k // 2, bias=False) for k in (3, 1))
        if inputs == outputs and stride == 1:
            self.kernels.append(nn.Conv2d(inputs, outputs, 1, bias=False).requires_grad_(False))
            nn.init.dirac_(self.kernels[-1].weight)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in self.kernels)
        self.merged: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return F.relu(self.merged(x))
        return F.relu(sum(norm(kernel(x)) for kernel, norm in zip(self.kernels, self.norms, strict=True)))

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        first = self.kernels[0]
        weight, bias = torch.zeros_like(first.weight), torch.zeros(first.out_channels)
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            scale, border = norm.weight * (norm.running_var + norm.eps).rsqrt(), (3 - kernel.kernel_size[0]) // 2
            weight += F.pad(kernel.weight * scale[:, None, None, None], (border,) * 4)
            bias += norm.bias - norm.running_mean * scale
        self.merged = nn.Conv2d(first.in_channels, first.out_channels, 3, first.stride, 1)
        self.merged.weight.copy_(weight)
        self.merged.bias.copy_(bias)
        del self.kernels, self.norms


class PlainBlock(nn.Sequential):
    """3x3, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Network(nn.Sequential):
    """Eight blocks, pooling, and a linear layer."""

    def __init__(self, block: type[nn.Module]) -> None:
        sizes = [(1, 16, 2), *[(16, 16, 1)] * 3, (16, 32, 2), *[(32, 32, 1)] * 3]
        pooling = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
        super().__init__(*[block(*size) for size in sizes], *pooling)


NETWORKS = {
    "published blocks": (PublishedBlock, None),
    "`Reparameterization(RepVGG())`": (PlainBlock, 0.0),
    "`Reparameterization(RepVGG(), initial_scale=1.0)`": (PlainBlock, 1.0),
    "without branches": (PlainBlock, None),
}


def accuracies(task: FashionCNN, name: str, epochs: int, seed: int) -> list[float]:
    """Return the test accuracy in float, and that of each way to quantize."""
    block, scale = NETWORKS[name]
    L.seed_everything(seed, verbose=False)
    module = task.module(Network(block))
    callbacks = [] if scale is None else [Reparameterization(RepVGG(), initial_scale=scale)]
    L.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET).fit(module, task.train_loader())
    ll.merge_branches(module.eval())
    images = [images for images, _ in task.batches(CALIBRATION_BATCHES)]
    found = [top1(module, task)]
    for per_channel, equalize in QUANTIZED.values():
        quantized = copy.deepcopy(module.net)
        recipe = ll.Int8(per_channel=per_channel)
        ll.quantize(quantized, None, recipe, data=images, equalize=equalize, progress_bar=False)
        with ll.fake_quantized(quantized):
            found.append(top1(quantized, task))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = FashionCNN(Path(), args.data)
    print("| | float |", " | ".join(QUANTIZED), "|\n|---|---|" + "---|" * len(QUANTIZED))
    for name in NETWORKS:
        rows = [accuracies(task, name, args.epochs, seed) for seed in range(args.seeds)]
        columns = [f"{100 * mean(column):.2f} ({100 * min(column):.2f})" for column in zip(*rows, strict=True)]
        print(f"| {name} |", " | ".join(columns), "|", flush=True)


if __name__ == "__main__":
    main()
