"""Prune half-way through the training to 30 % of the MACs: channels chosen by learned gates, or by magnitude.

The recipe in one run: gates trained on the batches before the cut, one cut that leaves every layer at least 40 % of its
channels, batch-norm statistics corrected, then the unpruned network as teacher. Six minutes on one CPU core.
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
from lightning_light.structured import Widths

Classifier = importlib.import_module("01_prune_and_export").Classifier


def recipe(criterion: ll.criteria.Criterion) -> list[L.Callback]:
    """One cut in the middle of the run, after which the network of before the cut is the teacher."""
    return [
        ll.KnowledgeDistillation(teacher="self", losses=[ll.SoftTargets(temperature=4.0)]),
        ll.StructuredPruning(
            ll.MACs(0.3), criterion=criterion, schedule=ll.OneShot(at=0.5), widths=Widths(min_remaining=0.4)
        ),
    ]


def train(callbacks: list[L.Callback], args: argparse.Namespace) -> list[str]:
    """Train one network; return its row of the table."""
    L.seed_everything(args.seed, verbose=False)
    module, data = Classifier(), FashionMNIST(args.data)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=callbacks,
        default_root_dir=args.out,
        limit_val_batches=0,
        log_every_n_steps=10,
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    cost = count_cost(module, (torch.zeros(1, 1, 28, 28),))
    return [f"{metrics['test_accuracy']:.2%}", f"{cost.params:,}", f"{cost.macs / 1e6:.2f} M"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100, help="of the gates")
    parser.add_argument("--out", type=Path, default=Path("runs/learned_gates"))
    args = parser.parse_args()

    table = Table("", "test accuracy", "parameters", "MACs", title="Before -> after")
    table.add_row("dense", *train([], args))
    table.add_row("magnitude", *train(recipe(ll.Magnitude()), args))
    table.add_row("learned gates", *train(recipe(ll.criteria.LearnedGates(args.steps)), args))
    Console().print(table)


if __name__ == "__main__":
    main()
