"""Time of a conversion beside the time of ``torch.linalg.svd`` on the same matrices, in turns in one process.

    python benchmarks/lowrank.py

The matrices are those that a form lowers the rank of; for Tucker-2 both unfoldings. A conversion decomposes, chooses
ranks under a budget, builds the layers and puts them into the network; the last column has what `factorize` does
besides, two forward passes that find the layers and count them.
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
from lightning_light.example_input import ExampleInput
from lightning_light.lowrank import LowRankFactorization, factorize
from lightning_light.lowrank.apply import apply_factors
from lightning_light.lowrank.build import dense_weight
from lightning_light.lowrank.functional import make_plan
from lightning_light.lowrank.layers import find_layers
from lightning_light.lowrank.spectra import matricize
from lightning_light.measure import count_cost


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


def convert(net: nn.Module, layers: Any, reasons: Any, method: LowRankFactorization, dense: float) -> None:
    plan = make_plan(net, method, layers, reasons, dense, 0.5 * dense, {}, [])
    apply_factors(net, plan)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | form | conversion | svd of the same matrices | ratio | with forward passes |")
    print("|---|---|---|---|---|---|")
    for name, (make, shape) in NETS.items():
        for form in ("channel", "spatial", "tucker2"):
            net, example = make(), (torch.zeros(shape),)
            method, names = (
                LowRankFactorization(MACs(0.5), form=form, round_to=4),
                [name for name, _ in net.named_modules()],
            )
            dense, turns = count_cost(net, example).macs, []
            for _ in range(args.turns):
                fresh, given = copy.deepcopy(net), matrices(net, form)
                plain = seconds(partial(decompose_all, given))
                layers, reasons = find_layers(fresh, ExampleInput(example), names, form=form, blocks={})
                ours = seconds(partial(convert, fresh, layers, reasons, method, dense))
                whole = seconds(partial(factorize, copy.deepcopy(net), example, factorization=method))
                turns.append((ours, plain, whole))
            best = [min(times) * 1e3 for times in zip(*turns, strict=True)]
            ratio = statistics.median(ours / plain for ours, plain, _ in turns)
            cells = [f"{best[0]:.0f} ms", f"{best[1]:.0f} ms", f"{ratio:.2f}", f"{best[2]:.0f} ms"]
            print(f"| {name} | {form} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
