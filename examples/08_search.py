"""Half-way through the training, search widths, ranks and depth under two budgets: 40 % of the MACs, a file of 90 kB.

Printed are the budgets beside the counted network and the written file, and channel pruning to the same MACs beside the
search.
"""

import argparse
import importlib
from pathlib import Path

import lightning as L
import torch
from fashion_mnist import FashionMNIST
from rich.console import Console
from rich.table import Table

import lightning_light as ll
from lightning_light.measure import count_cost

Classifier = importlib.import_module("01_prune_and_export").Classifier


def recipe(method: L.Callback) -> list[L.Callback]:
    """One change in the middle of the run, after which the network of before the change is the teacher."""
    return [ll.KnowledgeDistillation(teacher="self", losses=[ll.SoftTargets(temperature=4.0)]), method]


def train(callbacks: list[L.Callback], name: str, args: argparse.Namespace) -> list[str]:
    """Train and export one network; return its row of the table."""
    L.seed_everything(0, verbose=False)
    module, data = Classifier(), FashionMNIST(args.data)
    export = ll.MobileExport(args.out / f"{name}.ptl")
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[*callbacks, export],
        default_root_dir=args.out,
        limit_val_batches=0,
        log_every_n_steps=10,
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    macs = count_cost(module, (torch.zeros(1, 1, 28, 28),)).macs
    return [f"{metrics['test_accuracy']:.2%}", f"{macs / 1e6:.2f} M", f"{export.report.bytes / 1e3:.1f} kB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=20, help="of whole networks")
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    args = parser.parse_args()

    halfway = ll.OneShot(at=0.5)
    search = ll.ArchitectureSearch(
        [ll.MACs(0.4), ll.Size("90 kB")],
        schedule=halfway,
        runtime=ll.TorchScriptLite(),
        evaluations=args.evaluations,
        table=args.out / "table.json",
    )
    table = Table("", "test accuracy", "MACs", "file", title="Before -> after")
    table.add_row("dense", *train([], "dense", args))
    table.add_row(
        "channels alone", *train(recipe(ll.StructuredPruning(ll.MACs(0.4), schedule=halfway)), "channels", args)
    )
    table.add_row("search", *train(recipe(search), "searched", args))
    print(search.result.table.table(search.result.items))
    print(search.result)
    Console().print(table)


if __name__ == "__main__":
    main()
