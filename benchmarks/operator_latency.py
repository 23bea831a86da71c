"""Time lighter operators in ONNX Runtime beside the 3x3 convolutions that they replace.

    python -m benchmarks.operator_latency

Four layers in a row with activations, one sample, one thread; the median over rounds in turns of the ratio of the
fastest of a few calls each.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import lightning_light as ll
from benchmarks.experiments.harness import session
from lightning_light.measure.latency import measure_latency
from lightning_light.substitution import DepthwiseSeparable, Fire, Ghost, GroupShuffle, Operator

OPERATORS = [DepthwiseSeparable(1), DepthwiseSeparable(2), GroupShuffle(2), Ghost(2), Fire(0.25), Fire(0.5)]
SHAPES = ((16, 32), (32, 16), (64, 8))  # channels, pixels: those of a CIFAR-10 ResNet
ROUNDS, BURST = 60, 4


def written(channels: int, x: Tensor, operator: Operator | None = None) -> Callable[[], object]:
    """Write a network of four layers, and return a call of its file."""
    convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4)]
    layers = [conv if operator is None else operator.build(conv) for conv in convs]
    net = nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())]).eval()
    with tempfile.TemporaryDirectory() as folder:
        ll.export_model(net, x, Path(folder) / "net.onnx", latency_runs=1)
        file = session(Path(folder) / "net.onnx")
    return lambda: file(x)


def ratio(first: Callable[[], object], second: Callable[[], object]) -> float:
    ratios = []
    for number in range(ROUNDS):
        order = (first, second) if number % 2 else (second, first)
        seconds = {call: measure_latency(call, warmup=1, runs=BURST).p10 for call in order}
        ratios.append(seconds[first] / seconds[second])
    return median(ratios)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| operator | " + " | ".join(f"{channels} channels" for channels, _ in SHAPES) + " |\n|---|---|---|---|")
    inputs = [torch.zeros(1, channels, pixels, pixels) for channels, pixels in SHAPES]
    dense = [written(x.shape[1], x) for x in inputs]
    for operator in OPERATORS:
        ratios = [ratio(written(x.shape[1], x, operator), call) for x, call in zip(inputs, dense, strict=True)]
        print(f"| `{operator!r}` | " + " | ".join(f"{value:.2f}" for value in ratios) + " |", flush=True)


if __name__ == "__main__":
    main()
