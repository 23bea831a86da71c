"""An ImageNet network in int8 and in float: size of the files, and time of one image, in one process, one thread.

    python benchmarks/int8_latency.py --network ResNet-18 --rounds 20

Random weights, ranges from two random batches: for time and size alone. The runtimes take turns, image by image; given
are medians, and the median of the ratios of int8 to float with its quartiles. On this kind of machine read x86; the
kernels of qnnpack are made for ARM.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from imagenet_nets import NETS
from torch import Tensor, nn

import lightning_light as ll

FILES: dict[str, tuple[str | None, ll.export.Exporter]] = {
    "lite float": (None, ll.TorchScriptLite()),
    "lite x86": ("x86", ll.TorchScriptLite()),
    "lite qnnpack": ("qnnpack", ll.TorchScriptLite()),
    "ONNX float": (None, ll.ONNX()),
    "ONNX int8": ("qnnpack", ll.ONNX()),
    "ExecuTorch float": (None, ll.ExecuTorch()),
    "ExecuTorch int8": ("qnnpack", ll.ExecuTorch()),
}


def written(name: str, net: nn.Module, x: Tensor, folder: Path) -> tuple[ll.export.ExportReport, Callable[..., Any]]:
    engine, exporter = FILES[name]
    options: dict[str, Any] = {"exporter": exporter, "batch": "one", "latency_runs": 1}
    path = folder / f"{name.replace(' ', '_')}{exporter.suffix}"
    if engine is None:
        return ll.export_model(net, (x,), path, **options), exporter.load(path)
    ll.quantize(net, torch.randn(4, *x.shape[1:]), ll.Int8(engine=engine))
    with ll.fake_quantized(net):
        return ll.export_model(net, (x,), path, parity=ll.Tolerance(quant_steps=255), **options), exporter.load(path)


def timed(run: Callable[..., Any], x: Tensor) -> float:
    start = time.perf_counter()
    run(x)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="ResNet-18", choices=list(NETS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--files", nargs="*", default=list(FILES), choices=list(FILES))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, x = NETS[args.network]().eval(), torch.randn(1, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: written(name, net, x, Path(folder)) for name in args.files}
        for _ in range(3):
            [run(x) for _, run in files.values()]
        times = {name: [] for name in files}
        for _ in range(args.rounds):
            for name, (_, run) in files.items():
                times[name].append(timed(run, x))
    for name, (report, _) in files.items():
        float_name = f"{name.split()[0]} float"
        ratios = [mine / theirs for mine, theirs in zip(times[name], times[float_name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"| {name} | {report.bytes / 1e6:.2f} MB | {report.bytes / files[float_name][0].bytes:.3f} |",
            f"{statistics.median(times[name]):.2f} ms | {middle:.3f} ({low:.3f} to {high:.3f}) |",
        )
        if operations := report.details.get("int8_operations"):
            print(f"  {operations}, left float: {report.details['left_float'] or 'none'}")


if __name__ == "__main__":
    main()
