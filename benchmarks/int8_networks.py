"""One calibration, four int8 files: which of 36 networks with random weights each runtime runs, and how closely.

    python benchmarks/int8_networks.py --out int8_networks.json [--only resnet18 unet] [--table]

Signal-to-noise ratios in decibels, on one random input: the rounded module against float, the graph of quantize and
dequantize operations against the module, each file against that graph. ``exact`` is equality of every number. The
networks of torchvision and timm need those packages; what cannot be imported is left out, and said.
"""

import argparse
import importlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision_operators  # noqa: F401  before anything that imports torchvision if it is there
from small_nets import Audio1D, ControlFlow, LSTMTagger, TinyTransformer, UNet
from torch import Tensor, nn

import lightning_light as ll
from lightning_light.errors import LightningLightError
from lightning_light.example_input import ExampleInput
from lightning_light.export.copies import detached_copy
from lightning_light.export.inputs import Positional
from lightning_light.int8 import PairRules, rounders_of
from lightning_light.measure import measure_latency

FAILURES = (LightningLightError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
TORCHVISION: dict[str, dict[str, Any]] = {
    "resnet18": {}, "resnet50": {}, "mobilenet_v2": {}, "mobilenet_v3_large": {}, "mobilenet_v3_small": {},
    "efficientnet_b0": {}, "shufflenet_v2_x1_0": {}, "squeezenet1_1": {}, "densenet121": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "regnet_y_400mf": {}, "convnext_tiny": {}, "vit_b_16": {}, "swin_t": {}, "mnasnet1_0": {},
}  # fmt: skip
TIMM = {
    "mobilevit_s": "mobilevit_s", "ghostnet_100": "ghostnet_100", "repvgg_a0": "repvgg_a0",
    "deit_tiny": "deit_tiny_patch16_224", "mixer_s32": "mixer_s32_224", "efficientnet_lite0": "efficientnet_lite0",
    "mobilenetv4_small": "mobilenetv4_conv_small", "convnext_atto": "convnext_atto", "fbnetc_100": "fbnetc_100",
    "edgenext_xxs": "edgenext_xx_small", "fastvit_t8": "fastvit_t8", "mobileone_s0": "mobileone_s0",
    "levit_128s": "levit_128s", "rexnet_100": "rexnet_100",
}  # fmt: skip
SIZES = {"inception_v3": 299, "timm:mobilevit_s": 256, "timm:fastvit_t8": 256}
SMALL: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "lstm_tagger": (LSTMTagger, torch.randint(200, (1, 32))),
    "gru_tagger": (lambda: LSTMTagger(nn.GRU), torch.randint(200, (1, 32))),
    "tiny_transformer": (TinyTransformer, torch.randint(200, (1, 32))),
    "unet": (UNet, torch.randn(1, 3, 128, 128)),
    "audio1d": (Audio1D, torch.randn(1, 1, 8000)),
    "control_flow": (ControlFlow, torch.randn(1, 3, 32, 32)),
}
NETWORKS = [*TORCHVISION, *(f"timm:{name}" for name in TIMM), *SMALL]
RUNTIMES: dict[str, ll.Exporter] = {
    "qnnpack": ll.TorchScriptLite(), "x86": ll.TorchScriptLite(), "ExecuTorch": ll.ExecuTorch(max_batch=1),
    "ONNX": ll.ONNX(),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor]:
    """The network and an example of its input."""
    torch.manual_seed(0)
    if name in SMALL:
        return SMALL[name][0](), SMALL[name][1]
    example = torch.randn(1, 3, SIZES.get(name, 224), SIZES.get(name, 224))
    if name.startswith("timm:"):
        return importlib.import_module("timm").create_model(TIMM[name[5:]]), example
    return getattr(importlib.import_module("torchvision.models"), name)(weights=None, **TORCHVISION[name]), example


def another(example: Tensor, samples: int) -> Tensor:
    shape = (samples, *example.shape[1:])
    return torch.randn(shape) if example.is_floating_point() else torch.randint(200, shape)


def warmed(net: nn.Module, example: Tensor) -> nn.Module:
    """No layer of zeros, and batch norms that have seen three batches."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.detach().any():
            nn.init.normal_(layer.weight, std=0.05)
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 0.5
    with torch.no_grad():
        for _ in range(3 if norms else 0):
            net.train()(another(example, 4))
    return net.eval()


def decibels(right: Tensor, found: Tensor) -> float:
    noise = (right.double() - found.double()).norm()
    return float("inf") if noise == 0 else round(float(20 * torch.log10(right.double().norm() / noise)), 1)


def first(answer: Any) -> Tensor:
    return answer if isinstance(answer, Tensor) else first(answer[0])


def measure(name: str, runtimes: list[str], folder: Path) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    net, example = made(name)
    warmed(net, example)
    x, calibration = another(example, 1), [another(example, 2) for _ in range(3)]
    with torch.no_grad():
        plain = first(net(x))
    row: dict[str, Any] = {"name": name, "sqnr": {}, "error": {}, "ms": {}, "bytes": {}, "left_float": {}}
    for engine in ("qnnpack", "x86"):
        mine = [one for one in runtimes if (one == "x86") == (engine == "x86")]
        ll.quantize(net, calibration, ll.Int8(engine=engine))
        with ll.fake_quantized(net), torch.no_grad():
            module = first(net(x))
            with rounders_of(net)[0].in_pairs(lambda: net(x), PairRules(signed=True)):
                graph = first(net(x))
            if engine == "qnnpack":
                row |= {"module": decibels(plain, module), "graph": decibels(module, graph)}
            for runtime in mine:
                try:
                    row_of(row, runtime, net, x, module, graph, folder)
                except FAILURES as error:
                    row["error"][runtime] = f"{type(error).__name__}: {error}"[:300]
    return row


def row_of(
    row: dict[str, Any], runtime: str, net: nn.Module, x: Tensor, module: Tensor, graph: Tensor, folder: Path
) -> None:
    exporter = RUNTIMES[runtime]
    path = folder / f"net{exporter.suffix}"
    with torch.no_grad():
        details = exporter.write(Positional(detached_copy(net), ExampleInput((x,))), (x,), path)
    run = exporter.load(path)
    answer = first(run(x))
    row["sqnr"][runtime] = [decibels(module, answer), decibels(graph, answer)]
    row["ms"][runtime] = measure_latency(lambda: run(x), runs=5).median * 1e3
    row["bytes"][runtime], row["left_float"][runtime] = path.stat().st_size, sorted(details["left_float"])


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation: file against module; x86 adds biases in float, which the graph does not."""

    def cell(value: float) -> str:
        return "exact" if value == float("inf") else f"{value:.1f}"

    def failed(row: dict[str, Any], runtime: str) -> str:
        return "refused" if row["error"].get(runtime, "").startswith("TraceError") else "fails"

    lines = [f"| network | module | graph | {' | '.join(RUNTIMES)} |", "|---|---|---|" + "---|" * len(RUNTIMES)]
    for row in rows:
        if "module" not in row:
            lines.append(f"| {row['name']} | · | · |" + " fails |" * len(RUNTIMES))
            continue
        cells = [cell(row["sqnr"][one][0]) if one in row["sqnr"] else failed(row, one) for one in RUNTIMES]
        lines.append(f"| {row['name']} | {cell(row['module'])} | {cell(row['graph'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("int8_networks.json"))
    parser.add_argument("--only", nargs="*", default=NETWORKS)
    parser.add_argument("--runtimes", nargs="*", default=list(RUNTIMES))
    parser.add_argument("--table", action="store_true", help="print what --out holds, and measure nothing")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in [] if args.table else [name for name in args.only if name not in rows]:
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows[name] = measure(name, args.runtimes, Path(folder))
        except (ImportError, *FAILURES) as error:
            rows[name] = {"name": name, "error": {"all": f"{type(error).__name__}: {error}"[:300]}}
        rows[name]["seconds"] = round(time.monotonic() - start, 1)
        args.out.write_text(json.dumps(rows, indent=1))
        print(rows[name], flush=True)
    print(table([rows[name] for name in NETWORKS if name in rows]))


if __name__ == "__main__":
    main()
