"""Time of a conversion beside the time of ``torch.linalg.svd`` on the same matrices, in turns in one process.

    python benchmarks/lowrank.py

The matrices are those that a form lowers the rank of; for Tucker-2 both unfoldings. A conversion also plans the ranks
under a budget, builds the layers and puts them into the network.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from nets import cifar_resnet
from torch import Tensor, nn

from lightning_light.budgets import MACs
from lightning_light.lowrank import LowRankFactorization, factorize
from lightning_light.lowrank.build import dense_weight
from lightning_light.lowrank.spectra import matricize


def wide() -> nn.Module:
    """Layers as wide as an ImageNet network's."""
    convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((128, 256), (256, 256), (256, 512))]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-20": (lambda: cifar_resnet(20), (1, 3, 32, 32)),
    "ResNet-56": (lambda: cifar_resnet(56), (1, 3, 32, 32)),
    "three wide convolutions": (wide, (1, 128, 14, 14)),
}


def matrices(net: nn.Module, form: str) -> list[Tensor]:
    """What the conversion has to decompose."""
    found = []
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            found.append(dense_weight(layer))
        elif isinstance(layer, nn.Conv2d) and form == "tucker2":
            weight = dense_weight(layer)
            found += [weight.flatten(2), weight.transpose(1, 2).flatten(2)]
        elif isinstance(layer, nn.Conv2d):
            found.append(matricize(form, dense_weight(layer)))
    return found


def decompose_all(given: list[Tensor]) -> None:
    for matrix in given:
        torch.linalg.svd(matrix, full_matrices=False)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | form | conversion | svd of the same matrices | ratio |\n|---|---|---|---|---|")
    for name, (make, shape) in NETS.items():
        for form in ("channel", "spatial", "tucker2"):
            net, example = make(), (torch.zeros(shape),)
            method, pairs = LowRankFactorization(MACs(0.5), form=form, round_to=4), []
            for _ in range(args.turns):
                fresh, given = copy.deepcopy(net), matrices(net, form)
                plain = seconds(partial(decompose_all, given))
                pairs.append((seconds(partial(factorize, fresh, example, factorization=method)), plain))
            ours, theirs = (min(times) for times in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"| {name} | {form} | {ours * 1e3:.0f} ms | {theirs * 1e3:.0f} ms | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
