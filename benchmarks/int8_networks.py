"""One training, four int8 files: which of 36 networks with random weights each runtime runs, and how closely.

    python benchmarks/int8_networks.py --out int8_networks.json [--only resnet18 unet] [--seeds 0 1 2] [--table]

Ranges are those of two batches of two samples; a Trainer trains fake-quantized on two of four. Then, on one
random input, signal-to-noise ratios in decibels: the fake-quantized module against float, the QDQ
graph against the module, each file against the module, against that graph, and against float. ``exact`` is
equality of every number. The networks of torchvision and timm need those packages; what cannot be imported is left
out, and said.

Deep networks with random weights amplify differences of one quantization step: a ratio is as random as the weights,
so the table has the mean over the seeds.
"""

import argparse
import copy
import importlib
import itertools
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from small_nets import Audio1D, ControlFlow, LSTMTagger, TinyTransformer, UNet
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_light as ll
from lightning_light.errors import LightningLightError
from lightning_light.example_input import ExampleInput
from lightning_light.export.copies import detached_copy
from lightning_light.export.inputs import Positional
from lightning_light.int8 import QDQConstraints, quantizers_of
from lightning_light.measure import measure_latency

FAILURES = (LightningLightError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
TORCHVISION: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet50": {},
    "mobilenet_v2": {},
    "mobilenet_v3_large": {},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "shufflenet_v2_x1_0": {},
    "squeezenet1_1": {},
    "densenet121": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "regnet_y_400mf": {},
    "convnext_tiny": {},
    "vit_b_16": {},
    "swin_t": {},
    "mnasnet1_0": {},
}
TIMM = {
    "mobilevit_s": "mobilevit_s",
    "ghostnet_100": "ghostnet_100",
    "repvgg_a0": "repvgg_a0",
    "deit_tiny": "deit_tiny_patch16_224",
    "mixer_s32": "mixer_s32_224",
    "efficientnet_lite0": "efficientnet_lite0",
    "mobilenetv4_small": "mobilenetv4_conv_small",
    "convnext_atto": "convnext_atto",
    "fbnetc_100": "fbnetc_100",
    "edgenext_xxs": "edgenext_xx_small",
    "fastvit_t8": "fastvit_t8",
    "mobileone_s0": "mobileone_s0",
    "levit_128s": "levit_128s",
    "rexnet_100": "rexnet_100",
}
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
ARM, X86, VNNI = ll.Int8(), ll.Int8(engine="x86"), ll.Int8(engine="x86", reduce_range=False)
RUNTIMES: dict[str, tuple[ll.quantization.Recipe, ll.export.Exporter]] = {
    "qnnpack": (ARM, ll.TorchScriptLite()),
    "x86": (X86, ll.TorchScriptLite()),
    "x86 with VNNI": (VNNI, ll.TorchScriptLite()),
    "ExecuTorch": (ARM, ll.ExecuTorch(max_batch=1)),
    "ONNX": (ARM, ll.ONNX()),
}


class Randomly(LightningModule):
    """A network that is trained a little, so that it computes what it did."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return first(self.net(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-5)


def made(name: str) -> tuple[nn.Module, Tensor]:
    """The network and an example of its input."""
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
    for norm in norms:
        norm.momentum = 0.1
    return net.eval()


def trained(net: nn.Module, batches: list[Tensor], recipe: ll.quantization.Recipe, folder: Path) -> Randomly:
    """Ranges from the first two batches, then training fake-quantized on the others."""
    module = Randomly(copy.deepcopy(net))
    ll.quantize(module, None, recipe, data=batches[:2])
    qat = ll.QuantizationAwareTraining(recipe, start=0.0, freeze_observers=0.0, freeze_batch_norm=1.0)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[qat],
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module.train(), DataLoader(batches[2:], batch_size=None))
    return module.eval()


def decibels(right: Tensor, found: Tensor) -> float:
    noise = (right.double() - found.double()).norm()
    return float("inf") if noise == 0 else round(float(20 * torch.log10(right.double().norm() / noise)), 1)


def first(answer: Any) -> Tensor:
    return answer if isinstance(answer, Tensor) else first(answer[0])


def measure(name: str, seed: int, runtimes: list[str], folder: Path) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(seed)
    net, example = made(name)
    warmed(net, example)
    x, batches = another(example, 1), [another(example, samples) for samples in (2, 2, 4, 4)]
    row: dict[str, Any] = {"name": name, "sqnr": {}, "error": {}, "ms": {}, "bytes": {}, "left_float": {}}
    for recipe in (ARM, X86, VNNI):
        mine = [one for one in runtimes if RUNTIMES[one][0] is recipe]
        if not mine:
            continue
        model = trained(net, batches, recipe, folder)
        with torch.no_grad():
            plain = model(x)
        with ll.fake_quantized(model), torch.no_grad():
            module = model(x)
            with quantizers_of(model)[0].qdq(lambda model=model: model(x), QDQConstraints("xnnpack", signed=True)):
                graph = model(x)
            if recipe is ARM:
                row |= {"module": decibels(plain, module), "graph": decibels(module, graph)}
            for runtime in mine:
                try:
                    row_of(row, runtime, model, x, (module, graph, plain), folder)
                except FAILURES as error:
                    row["error"][runtime] = f"{type(error).__name__}: {error}"[:300]
    return row


def row_of(
    row: dict[str, Any], runtime: str, net: nn.Module, x: Tensor, outputs: tuple[Tensor, ...], folder: Path
) -> None:
    exporter = RUNTIMES[runtime][1]
    path = folder / f"net{exporter.suffix}"
    with torch.no_grad():
        details = exporter.write(Positional(detached_copy(net), ExampleInput((x,))), (x,), path)
    run = exporter.load(path)
    result = first(run(x))
    row["sqnr"][runtime] = [decibels(output, result) for output in outputs]
    row["ms"][runtime] = measure_latency(lambda: run(x), runs=5).median * 1e3
    row["bytes"][runtime], row["left_float"][runtime] = path.stat().st_size, sorted(details["left_float"])


def mean(ratios: Iterable[float]) -> float:
    """The ratio of the mean noise."""
    noise = statistics.fmean(10 ** (-ratio / 10) for ratio in ratios)
    return float("inf") if noise == 0 else -10 * math.log10(noise)


def table(rows: dict[str, dict[str, dict[str, Any]]], against: int = 0) -> str:
    """For the documentation: file ``against`` the module, 0; the graph, 1; or float, 2."""

    def cell(row: list[dict[str, Any]], *path: Any) -> str:
        found = []
        for value in row:
            for step in path:
                value = value[step] if isinstance(value, list) else value.get(step, {})
                if value == {}:
                    error = str(row[0].get("error", {}))
                    return "refused" if "TraceError" in error else "fails"
            found.append(value)
        ratio = mean(found)
        return "exact" if ratio == float("inf") else f"{ratio:.1f}"

    lines = [f"| network | module | graph | {' | '.join(RUNTIMES)} |", "|---|---|---|" + "---|" * len(RUNTIMES)]
    for name in [name for name in NETWORKS if name in rows]:
        row = list(rows[name].values())
        paths: list[tuple[Any, ...]] = [("module",), ("graph",), *(("sqnr", one, against) for one in RUNTIMES)]
        lines.append(f"| {name} | {' | '.join(cell(row, *path) for path in paths)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("int8_networks.json"))
    parser.add_argument("--only", nargs="*", default=NETWORKS)
    parser.add_argument("--runtimes", nargs="*", default=list(RUNTIMES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="print what --out holds, and measure nothing")
    parser.add_argument("--against", choices=("module", "graph", "float"), default="module")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows: dict[str, dict[str, dict[str, Any]]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for seed, name in [] if args.table else itertools.product(args.seeds, args.only):
        if str(seed) in rows.setdefault(name, {}):
            continue
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(name, seed, args.runtimes, Path(folder))
        except (ImportError, *FAILURES) as error:
            row = {"name": name, "error": {"all": f"{type(error).__name__}: {error}"[:300]}}
        rows[name][str(seed)] = row | {"seconds": round(time.monotonic() - start, 1)}
        args.out.write_text(json.dumps(rows, indent=1))
        print(seed, rows[name][str(seed)], flush=True)
    print(table(rows, ("module", "graph", "float").index(args.against)))


if __name__ == "__main__":
    main()
