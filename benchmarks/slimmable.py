"""One network trained at four widths, beside four networks trained alone or pruned from one: three seeds.

    python benchmarks/slimmable.py --work runs

The network of the examples and their part of Fashion-MNIST. Per seed:

- slimmable: one run, all widths from ``--start`` on; accuracies are those of the extracted networks.
- pruned: the whole network for half of the epochs, then each narrower one pruned from it and trained for an equal share
  of the other half, with the whole one as teacher: as many epochs in total.
- alone: each width trained from scratch, for all epochs each.

Results are kept in ``--work``; then they are printed as a table.
"""

import argparse
import copy
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev

import lightning as L
import torch

import lightning_light as ll
from lightning_light.slimmable import SlimmableTraining, extract_width
from lightning_light.structured import Widths

sys.path.append(str(Path(__file__).parents[1] / "examples"))

WIDTHS = (1.0, 0.75, 0.5, 0.25)
EXAMPLE = torch.zeros(1, 1, 28, 28)
Row = dict[str, list[float]]


def train(module: L.LightningModule, epochs: int, callbacks: list[L.Callback]) -> float:
    """Train, and return the seconds of processor time."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, limit_val_batches=0, accelerator="cpu", **quiet)
    began = time.process_time()
    trainer.fit(module, datamodule=import_module("fashion_mnist").FashionMNIST())
    return time.process_time() - began


def accuracy(module: L.LightningModule) -> float:
    """Return the test accuracy."""
    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    (metrics,) = trainer.test(module, datamodule=import_module("fashion_mnist").FashionMNIST(), verbose=False)
    return metrics["test_accuracy"]


def narrowed(module: L.LightningModule, width: float) -> L.LightningModule:
    """Return a copy with the most important channels of every layer."""
    small = copy.deepcopy(module)
    if width < 1.0:
        ll.prune_channels(small, EXAMPLE, remaining={"*": width}, widths=Widths(min_channels=1, min_remaining=0.0))
    return small


def slimmable(make, epochs: int, start: float) -> Row:
    module = make(lr=0.1, channels_last=True)
    seconds = train(module, epochs, [SlimmableTraining(WIDTHS, start=start)])
    return {"accuracy": [accuracy(extract_width(module, width)) for width in WIDTHS], "seconds": [seconds]}


def pruned(make, epochs: int, _: float) -> Row:
    module, each = make(lr=0.1, channels_last=True), epochs // 2 // (len(WIDTHS) - 1)
    seconds, found = [train(module, epochs - each * (len(WIDTHS) - 1), [])], [accuracy(module)]
    teacher = copy.deepcopy(module).eval()
    for width in WIDTHS[1:]:
        small = narrowed(module, width)
        small.hparams.lr = 0.05
        seconds.append(train(small, each, [ll.KnowledgeDistillation(teacher, losses=[ll.SoftTargets()])]))
        found.append(accuracy(small))
    return {"accuracy": found, "seconds": seconds}


def alone(make, epochs: int, _: float) -> Row:
    modules = [narrowed(make(lr=0.1, channels_last=True), width) for width in WIDTHS]
    seconds = [train(module, epochs, []) for module in modules]
    return {"accuracy": [accuracy(module) for module in modules], "seconds": seconds}


KINDS = {"slimmable": slimmable, "pruned": pruned, "alone": alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--start", type=float, default=0.3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    kept, make = args.work / "slimmable.json", import_module("01_prune_and_export").Classifier
    rows: dict[str, Row] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in args.kinds:
        for seed in range(args.seeds):
            if (key := f"{name}, {args.epochs} epochs, start {args.start}, seed {seed}") not in rows:
                L.seed_everything(seed, verbose=False)
                rows[key] = KINDS[name](make, args.epochs, args.start)
                kept.write_text(json.dumps(rows, indent=1))
                print(key, rows[key], flush=True)
    print("| training |", " | ".join(f"{width:g}" for width in WIDTHS), "| processor time |")
    for name in args.kinds:
        found = [rows[f"{name}, {args.epochs} epochs, start {args.start}, seed {seed}"] for seed in range(args.seeds)]
        cells = [[100 * row["accuracy"][place] for row in found] for place in range(len(WIDTHS))]
        texts = [f"{mean(cell):.2f} ± {stdev(cell) if len(cell) > 1 else 0.0:.2f}" for cell in cells]
        print(f"| {name} |", " | ".join(texts), f"| {mean(sum(row['seconds']) for row in found):.0f} s |")


if __name__ == "__main__":
    main()
