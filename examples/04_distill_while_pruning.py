"""Prune a trained network to 30 % of its MACs, alone and with the unpruned network as its teacher.

``teacher="self"`` distills from a copy of the network made before the first cut. A minute on one CPU core.
"""

import argparse
import copy
import importlib
from pathlib import Path

import lightning as L
import torch
from fashion_mnist import FashionMNIST
from rich.console import Console
from rich.table import Table

import lightning_light as ll
from lightning_light.distillation import KnowledgeDistillation, SoftTargets
from lightning_light.measure import count_cost

Classifier = importlib.import_module("03_distill").Classifier


def train(module: L.LightningModule, callbacks: list[L.Callback], epochs: int, args: argparse.Namespace) -> list[str]:
    """Train ``module``; return its row of the table."""
    L.seed_everything(args.seed, verbose=False)
    data = FashionMNIST(args.data)
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=callbacks, default_root_dir=args.out, limit_val_batches=0, log_every_n_steps=10
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    cost = count_cost(module, (torch.zeros(1, 1, 28, 28),))
    return [f"{metrics['test_accuracy']:.2%}", f"{cost.params:,}", f"{cost.macs / 1e6:.2f} M"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/distill_while_pruning"))
    args = parser.parse_args()

    L.seed_everything(args.seed, verbose=False)
    dense = Classifier(24)
    before = train(dense, [], args.epochs, args)
    rows = {}
    for name in ("pruned alone", "pruned with itself as teacher"):
        pruning = ll.StructuredPruning(ll.MACs(0.3), schedule=ll.Window(ll.Cubic(), start=0.1, end=0.5))
        distillation = KnowledgeDistillation(teacher="self", losses=[SoftTargets(temperature=4.0)])
        callbacks = [pruning] if name == "pruned alone" else [distillation, pruning]
        module = copy.deepcopy(dense)
        module.hparams.lr = dense.hparams.lr / 5
        rows[name] = train(module, callbacks, max(args.epochs // 2, 2), args)
    table = Table("", "test accuracy", "parameters", "MACs", title="Before -> after")
    table.add_row("dense", *before)
    for name, row in rows.items():
        table.add_row(name, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
