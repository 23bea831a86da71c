"""A CIFAR-10 ResNet in fewer bits without training: what equalization, bias correction and AdaRound win, mixed bits.

    python benchmarks/post_training.py --data cifar10.npz --weights resnet20_cifar10.pt --part rounding

``--data`` and ``--weights`` as in ``cifar_resnet.py``. Calibration images are drawn from the training set by the seed;
accuracy is that of the whole test set.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from cifar_resnet import accuracy, read
from nets import cifar_resnet
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_light as ll

OPTIONS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "equalized": {"equalize": True},
    "bias corrected": {"correct_bias": True},
    "equalized, bias corrected": {"equalize": True, "correct_bias": True},
    "AdaRound": {"rounding": True},
    "AdaRound, bias corrected": {"rounding": True, "correct_bias": True},
}


class Bench:
    """A trained network, and what it is calibrated and tested on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.data = args, read(args.data)
        chosen = torch.randperm(len(self.data["train"]), generator=torch.Generator().manual_seed(args.seed))[
            : args.images
        ]
        self.calibration: list[Tensor] = list(self.data["train"].tensors[0][chosen].split(64))
        self.test = TensorDataset(*self.data["test"][: args.test])

    def net(self) -> nn.Module:
        """As trained."""
        net = cifar_resnet(self.args.depth)
        net.load_state_dict(torch.load(self.args.weights, weights_only=True))
        return net.eval()

    def row(self, name: str, recipe: ll.recipes.Recipe, **options: Any) -> None:
        """Quantize and test."""
        if options.get("rounding"):
            options["rounding"] = ll.quantization.AdaRound(
                steps=self.args.steps, batch_size=self.args.batch, seed=self.args.seed
            )
        began = time.perf_counter()
        net = ll.quantize(self.net(), None, recipe, data=self.calibration, **options)
        took = time.perf_counter() - began
        with ll.fake_quantized(net):
            found = accuracy(net, self.test)
        print(f"{name:34} {found:.2%}  quantized in {took:.0f} s", flush=True)

    def rounding(self) -> None:
        """Weights of four and three bits."""
        for bits in self.args.bits:
            for name, options in OPTIONS.items():
                self.row(f"W{bits}A8 {name}", ll.IntN(weights=bits, activations=8), **options)

    def mixed(self) -> None:
        """Bits for each layer against the same for all, at the same size."""
        began = time.perf_counter()
        scan = ll.measure_sensitivity(self.net(), data=self.calibration, bits=(2, 3, 4, 5, 6, 8))
        print(f"{scan}\nmeasured in {time.perf_counter() - began:.0f} s", flush=True)
        for bits in self.args.bits:
            size = sum(scan.weights.values()) * bits // 8
            budget = ll.quantization.BitBudget(size=size)
            solved = budget.solve(scan)
            found = sum(scan.distances[layer][width] for layer, width in solved.items())
            uniform = sum(distances[bits] for distances in scan.distances.values())
            print(f"{size} bytes: sum of distances {found:.4f}, uniform {uniform:.4f}; bits {list(solved.values())}")
            self.row(f"{bits} bits in all layers", ll.IntN(weights=bits))
            self.row(f"{bits} bits in the mean", budget.recipe(scan))

    def int8(self) -> None:
        """Eight bits, by both engines' limits."""
        for engine in ("qnnpack", "x86"):
            self.row(f"int8 {engine}", ll.Int8(engine=engine))
        for name in ("equalized, bias corrected",):
            self.row(f"int8 x86 {name}", ll.Int8(engine="x86"), **OPTIONS[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--part", default="rounding", choices=("rounding", "mixed", "int8"))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--images", type=int, default=512, help="for calibration")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--steps", type=int, default=1000, help="of AdaRound, for each layer")
    parser.add_argument("--batch", type=int, default=32, help="of AdaRound")
    parser.add_argument("--seed", type=int, default=0)
    bench = Bench(parser.parse_args())
    print(f"{'float':34} {accuracy(bench.net(), bench.test):.2%}", flush=True)
    getattr(bench, bench.args.part)()


if __name__ == "__main__":
    main()
