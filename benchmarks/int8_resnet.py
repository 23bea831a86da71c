"""A CIFAR-10 ResNet in int8, after training and with training: top-1 of the module and of each runtime's file, size.

    python benchmarks/int8_resnet.py --data cifar10.npz --weights resnet20_cifar10.pt --epochs 1

``--data`` and ``--weights`` as in ``cifar_resnet.py``; training is that of ``low_bits_resnet.py``. Everything is
measured on the whole test set; each file is run by its own runtime. One quantized module makes the files of qnnpack,
ExecuTorch and ONNX Runtime; ``--engine x86`` makes that of x86, whose weights are quantized to a smaller range.
"""

import argparse
import tempfile

import lightning as L
import torch
from cifar_resnet import read
from low_bits_resnet import trained, trained_on, training_options
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_light as ll

RUNTIMES: dict[str, ll.export.Exporter] = {
    "lite": ll.TorchScriptLite(),
    "ExecuTorch": ll.ExecuTorch(),
    "ONNX": ll.ONNX(),
}


def export(net: nn.Module, exporter: ll.export.Exporter, data: TensorDataset) -> ll.export.ExportReport:
    images, labels = data.tensors
    batches = list(zip(images.split(100), labels.split(100), strict=True))
    accuracy = MulticlassAccuracy(int(labels.max()) + 1, average="micro")
    with tempfile.TemporaryDirectory() as folder:
        return ll.export_model(
            net,
            (images[:1],),
            f"{folder}/net{exporter.suffix}",
            exporter=exporter,
            data=batches,
            metrics=accuracy,
        )


def rows(name: str, net: nn.Module, data: TensorDataset, runtimes: list[str], plain: dict[str, int]) -> None:
    """One line for every file."""
    for runtime in runtimes:
        report = export(net, RUNTIMES[runtime], data)
        assert report.evaluation is not None
        accuracy = report.evaluation.metrics["MulticlassAccuracy"]
        if "output_scales" not in report.details:
            plain[runtime] = report.bytes
            print(
                f"{name:15} {runtime:10} {report.bytes / 1e3:.0f} kB {report.latency.median * 1e3:.3f} ms", flush=True
            )
            continue
        print(
            f"{name:15} {runtime:10} top-1 module {accuracy.model:.2%} file {accuracy.file:.2%}",
            f"agreement {report.evaluation.top1_agreement:.2%}",
            f"{report.bytes / 1e3:.0f} kB ({report.bytes / plain[runtime]:.2f})",
            f"{report.latency.median * 1e3:.3f} ms  differs by {report.parity.quant_steps} quantization steps",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    training_options(parser, epochs=0)
    parser.add_argument("--engine", default="qnnpack", choices=("qnnpack", "x86"))
    parser.add_argument("--runtimes", nargs="*", default=list(RUNTIMES), choices=list(RUNTIMES))
    args = parser.parse_args()

    L.seed_everything(args.seed, verbose=False)
    torch.set_num_threads(1)
    data, recipe, net = read(args.data), ll.Int8(engine=args.engine), trained(args).eval()
    plain: dict[str, int] = {}
    rows("float", net, data["test"], args.runtimes, plain)
    calibration = [x for x, _ in DataLoader(TensorDataset(*data["train"][:512]), 128)]
    with ll.fake_quantized(ll.quantize(net, None, recipe, data=calibration)):
        rows("after training", net, data["test"], args.runtimes, plain)
    if args.epochs:
        module, top1, _ = trained_on(trained(args), recipe, data, args)
        print(f"with training   top-1 in the Trainer {top1:.2%}", flush=True)
        with ll.fake_quantized(module):
            rows("with training", module, data["test"], args.runtimes, plain)


if __name__ == "__main__":
    main()
