"""Train a dense network; then one run prunes, distils and quantizes it, and writes a file for every runtime there is.

The Lightning module, of 01_prune_and_export.py, has no code for compression. Less than three minutes on one CPU core.
"""

import argparse
from importlib import import_module
from pathlib import Path

import lightning as L
from fashion_mnist import FashionMNIST
from rich.console import Console
from rich.table import Table

import lightning_light as ll

Classifier = import_module("01_prune_and_export").Classifier


def installed(*exporters: ll.export.Exporter) -> list[ll.export.Exporter]:
    """Those whose runtime is here; of the others is said how to install them."""
    found = []
    for exporter in exporters:
        try:
            exporter.check()
            found.append(exporter)
        except ll.errors.UnsupportedError as missing:
            print(missing)
    return found


def top1(export: ll.MobileExport, data: FashionMNIST) -> float:
    """Of the file, in its runtime, on all test images."""
    file = ll.load_exported(export.path, exporter=export.exporter)
    right = sum(int((file(images).argmax(1) == labels).sum()) for images, labels in data.test_dataloader())
    return right / len(data.test)


def train(
    name: str, callbacks: list[L.Callback], exporters: list[ll.export.Exporter], args: argparse.Namespace
) -> tuple[L.LightningModule, list[list[str]]]:
    """The trained module, and a row of the table for each runtime."""
    L.seed_everything(0, verbose=False)
    module, data = Classifier(), FashionMNIST(args.data)
    exports = [ll.MobileExport(args.out / f"{name}{exporter.suffix}", exporter=exporter) for exporter in exporters]
    trainer = L.Trainer(
        max_epochs=args.epochs, callbacks=[*callbacks, *exports], default_root_dir=args.out, log_every_n_steps=10
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)  # rounded, where the callback is in the list
    trainer.save_checkpoint(args.out / f"{name}.ckpt")
    rows = [
        [
            name,
            type(export.exporter).__name__,
            f"{metrics['test_accuracy']:.2%}",
            f"{top1(export, data):.2%}",
            f"{export.report.macs / 1e6:.2f} M",
            f"{export.report.bytes / 1e3:.0f} kB",
            f"{export.report.latency.median * 1e3:.3f} ms",
        ]
        for export in exports
    ]
    return module, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--engine", choices=("qnnpack", "x86"), default="qnnpack", help="phones, or this machine")
    parser.add_argument("--out", type=Path, default=Path("runs/quantize"))
    args = parser.parse_args()

    exporters = installed(ll.TorchScriptLite(), ll.ONNX(), ll.ExecuTorch())
    dense, before = train("dense", [], exporters, args)
    chain = [
        ll.KnowledgeDistillation(teacher=dense, losses=[ll.SoftTargets(temperature=4.0)]),
        ll.StructuredPruning(ll.MACs(0.4), schedule=ll.Window(ll.Cubic(), start=0.1, end=0.5)),
        ll.QuantizationAwareTraining(ll.Int8(engine=args.engine), start=0.7, calibration_batches=8),
        ll.CompressionMonitor(),
    ]
    _, after = train("int8", chain, exporters, args)
    table = Table("", "runtime", "accuracy", "of file", "MACs", "size", "latency", title="Before -> after")
    for row in [*before, *after]:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
