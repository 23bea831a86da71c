"""Prune networks to a latency of their written file, and compare the estimated with the measured time.

    python benchmarks/latency_budget.py --runtimes torchscript onnx

The weights are random: latency does not depend on them. Files are written until one is measured below the limit; it is
timed once more afterwards. Tables are kept in the cache folder (``LIGHTNING_LIGHT_CACHE``): a second run plans faster.
"""

import argparse
import time
from collections.abc import Callable

import torch
from nets import cifar_resnet
from small_nets import Audio1D, TinyTransformer, UNet
from torch import Tensor, nn

import lightning_light as ll
from lightning_light.example_input import ExampleInput
from lightning_light.measure.latency_table import LatencyTable
from lightning_light.structured import Widths


def vgg() -> nn.Module:
    """Six convolutions of 32 to 128 channels for images of 32 x 32."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


IMAGE = torch.zeros(1, 3, 32, 32)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "ResNet-20": (lambda: cifar_resnet(20), IMAGE),
    "VGG": (vgg, IMAGE),
    "U-Net": (UNet, torch.zeros(1, 3, 64, 64)),
    "Audio1D": (Audio1D, torch.zeros(1, 1, 4000)),
    "transformer": (TinyTransformer, torch.zeros(1, 32, dtype=torch.long)),
}
RUNTIMES = {"torchscript": ll.TorchScriptLite, "onnx": ll.ONNX, "executorch": ll.ExecuTorch}


def row(name: str, runtime: str, remaining: float) -> str:
    """Prune one network to ``remaining`` of its time in a runtime."""
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    net, start = make().eval(), time.perf_counter()
    table = LatencyTable.of(ll.Latency(1.0, RUNTIMES[runtime]()))
    assert table is not None
    dense = table.correct_by(net, ExampleInput((x,)))
    budget = ll.Latency(remaining * dense, RUNTIMES[runtime]())
    plan = ll.prune_channels(net, x, budget, widths=Widths(round_to=8))
    took = time.perf_counter() - start
    again = budget.measure(net, ExampleInput((x,)))
    assert plan.estimated is not None
    times = [f"{1e3 * seconds:.3f} ms" for seconds in (dense, budget.seconds, plan.estimated, plan.after, again)]
    return f"| {name} | {runtime} | {' | '.join(times)} | {plan.estimated / plan.after:.3f} | {took:.0f} s |"


def main() -> None:
    """Print one row per network and runtime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=["torchscript", "onnx"])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--remaining", type=float, default=0.85, help="fraction of the dense file's time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| network | runtime | dense | limit | estimated | measured | timed again | estimated / measured | planning |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for runtime in options.runtimes:
        for name in options.networks:
            print(row(name, runtime, options.remaining), flush=True)


if __name__ == "__main__":
    main()
