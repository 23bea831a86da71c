"""Compare the time of a factorization with ``torch.linalg.svd`` of the same matrices, alternating in one process.

    python benchmarks/lowrank.py

The matrices are those whose rank a form lowers; for Tucker-2 both unfoldings. A conversion decomposes the weights,
chooses ranks under a budget, builds the layers and puts them into the network. The last column adds what `factorize`
does besides: forward passes that find the layers and count their cost.
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
from lightning_light.criteria.gathered import Gathered
from lightning_light.example_input import ExampleInput
from lightning_light.lowrank import FactorizationOptions, RankAllocation, factorize
from lightning_light.lowrank.apply import apply_factors
from lightning_light.lowrank.build import dense_weight
from lightning_light.lowrank.functional import plan_layers
from lightning_light.lowrank.layers import find_layers
from lightning_light.lowrank.measurement import price_of
from lightning_light.lowrank.plan import Goal
from lightning_light.lowrank.spectra import matricize
from lightning_light.measure import count_cost


def wide() -> nn.Module:
    """Make layers as wide as those of an ImageNet network."""
    convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((128, 256), (256, 256), (256, 512))]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-20": (lambda: cifar_resnet(20), (1, 3, 32, 32)),
    "ResNet-56": (lambda: cifar_resnet(56), (1, 3, 32, 32)),
    "three wide convolutions": (wide, (1, 128, 14, 14)),
}


def matrices(net: nn.Module, form: str) -> list[Tensor]:
    """Return the matrices that the conversion decomposes."""
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


def convert(net: nn.Module, layers: Any, reasons: Any, options: FactorizationOptions, goal: Goal) -> None:
    apply_factors(net, plan_layers(net, layers, reasons, goal, options, gathered=Gathered()))


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
            options = FactorizationOptions(form=form, allocation=RankAllocation(round_to=4))
            names = [name for name, _ in net.named_modules()]
            dense, turns = count_cost(net, example).macs, []
            goal = Goal(MACs(0.5), dense, limit=0.5 * dense, final=0.5 * dense, price=price_of(MACs(0.5), net))
            for _ in range(args.turns):
                fresh, given = copy.deepcopy(net), matrices(net, form)
                plain = seconds(partial(decompose_all, given))
                layers, reasons = find_layers(fresh, ExampleInput(example), names, form=form, split={})
                ours = seconds(partial(convert, fresh, layers, reasons, options, goal))
                whole = seconds(
                    partial(factorize, copy.deepcopy(net), example, MACs(0.5), form=form, allocation=options.allocation)
                )
                turns.append((ours, plain, whole))
            best = [min(times) * 1e3 for times in zip(*turns, strict=True)]
            ratio = statistics.median(ours / plain for ours, plain, _ in turns)
            cells = [f"{best[0]:.0f} ms", f"{best[1]:.0f} ms", f"{ratio:.2f}", f"{best[2]:.0f} ms"]
            print(f"| {name} | {form} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
