"""A CIFAR-10 ResNet in int8, after training and with training: top-1 of the module and of the file, size, latency.

    python benchmarks/int8_resnet.py --data cifar10.npz --weights resnet20_cifar10.pt --engine qnnpack --epochs 1

``--data`` and ``--weights`` as in ``cifar_resnet.py``. Everything is measured on the whole test set; the file is run by
the lite interpreter with the kernels of its engine.
"""

import argparse
import tempfile
from pathlib import Path

import lightning as L
import torch
from cifar_resnet import EXAMPLE, Classifier, read
from nets import cifar_resnet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll
from lightning_light.example_input import ExampleInput


@torch.no_grad()
def answers(run: object, data: TensorDataset) -> torch.Tensor:
    """Classes that are told for the test set."""
    return torch.cat([run(x).argmax(1) for x, _ in DataLoader(data, 500)])


def export(net: nn.Module, path: str, exporter: ll.Exporter, data: TensorDataset) -> ll.export.ExportReport:
    batches = [ExampleInput((x,)) for x in data.tensors[0][:256].split(64)]  # top-1 is of all
    return ll.export_model(net, (EXAMPLE,), path, exporter=exporter, batches=batches)


def row(name: str, net: nn.Module, data: TensorDataset, report: ll.export.ExportReport, run: object) -> None:
    labels = data.tensors[1]
    module, file = answers(net, data), answers(run, data)
    print(
        f"{name:18} top-1 module {(module == labels).float().mean():.2%} file {(file == labels).float().mean():.2%}",
        f"agree {(module == file).float().mean():.2%}  {report.bytes / 1e3:.0f} kB",
        f"{report.latency.median * 1e3:.3f} ms",
        f"off by {report.parity.max_absolute:.4f}, scale {report.details.get('output_scales')}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--engine", default="qnnpack", choices=("qnnpack", "x86"))
    parser.add_argument("--epochs", type=int, default=0, help="of quantization-aware training")
    parser.add_argument("--steps", type=int, default=-1, help="of it, at most")
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    L.seed_everything(args.seed, verbose=False)
    data, recipe = read(args.data), ll.Int8(engine=args.engine)
    net = cifar_resnet(args.depth)
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    net.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/net.ptl"
        exporter = ll.TorchScriptLite()
        report = export(net, path, exporter, data["test"])
        row("float", net, data["test"], report, exporter.load(Path(path)))
        exporter = ll.TorchScriptInt8()
        calibration = [x for x, _ in DataLoader(TensorDataset(*data["train"][:512]), 128)]
        with ll.fake_quantized(ll.quantize(net, calibration, recipe)):
            report = export(net, path, exporter, data["test"])
            row("after training", net, data["test"], report, exporter.load(Path(path)))
        if args.epochs:
            module = Classifier(net, args.lr)
            qat = ll.QuantizationAwareTraining(recipe)
            trainer = L.Trainer(
                max_epochs=args.epochs, max_steps=args.steps, callbacks=[qat], logger=False,
                enable_checkpointing=False, accelerator="cpu",
            )  # fmt: skip
            trainer.fit(module, DataLoader(data["train"], 128, shuffle=True, drop_last=True))
            module.eval()
            with ll.fake_quantized(module):
                report = export(module, path, exporter, data["test"])
                row("with training", module, data["test"], report, exporter.load(Path(path)))


if __name__ == "__main__":
    main()
