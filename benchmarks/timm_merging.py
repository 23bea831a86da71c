"""Export re-parameterizable networks of timm with merged branches and as they are: outputs, latency, size.

    python benchmarks/timm_merging.py mobileone_s0 fastvit_t8 repvgg_a0

Needs timm. Weights are random, batch-norm statistics those of random images. Latency: of the ONNX files on one
thread, in turns, as processor time, which other processes of the machine affect little.
"""

import argparse
import importlib
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import lightning_light as ll
from lightning_light.export import load_exported

ROUNDS, BURST = 15, 3


def network(name: str) -> nn.Module:
    """Build a network of timm with batch norms that are not the identity, and normalize its activations."""
    torch.manual_seed(0)
    net = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias, 0.0, 0.1)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            norm.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(8, 3, 64, 64))
    return net.eval()


def fastest(call: Callable[[], object]) -> float:
    """Processor time of the fastest of a few calls."""
    call()
    seconds = []
    for _ in range(BURST):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return min(seconds)


def compared(net: nn.Module, x: Tensor) -> list[str]:
    """Export ``net`` twice; return the cells of its row."""
    files: list[Any] = []
    reports: list[Any] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for merged in (True, False):
            path = Path(folder) / f"{merged}.onnx"
            reports.append(ll.export_model(net, x, path, latency_runs=1, merge_branches=merged))
            files.append(load_exported(path))
        outputs = net(x)
        error = float((files[0](x) - outputs).abs().max() / outputs.abs().max())
        ratios = []
        for _ in range(ROUNDS):
            seconds = [fastest(lambda f=file: f(x)) for file in files]
            ratios.append(seconds[0] / seconds[1])
    blocks = len(reports[0].details["merged_branches"])
    params = " → ".join(f"{report.params / 1e6:.2f} M" for report in reversed(reports))
    return [str(blocks), f"{error:.1e}", f"{median(ratios):.2f}", params]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--pixels", type=int, default=96)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| network | merged blocks | largest difference / largest output | latency / plain | parameters |")
    print("|---|---|---|---|---|")
    for name in args.networks:
        x = torch.randn(1, 3, args.pixels, args.pixels)
        print("| " + " | ".join([f"`{name}`", *compared(network(name), x)]) + " |", flush=True)


if __name__ == "__main__":
    main()
