"""Make the changes of an `ArchitectureSearch` at once, or in portions: three seeds.

    python benchmarks/search_schedule.py --work runs

The network of the examples, trained on their part of Fashion-MNIST; then short runs under 30 % of its multiply-
accumulates and 40 % of its parameters, with the network of before as teacher. Results are kept in ``--work``, and
pictures of the networks that the searches have compared.
"""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

import lightning as L
import torch

import lightning_light as ll
from lightning_light.report.figures import svg

sys.path.append(str(Path(__file__).parents[1] / "examples"))

SCHEDULES = {
    "at once": ll.OneShot(at=0.1),
    "in portions": ll.Window(ll.schedules.Linear(), start=0.1, end=0.4),
}


def train(module: L.LightningModule, epochs: int, callbacks: list[L.Callback]) -> float:
    """Train under bfloat16 mixed precision; return the test accuracy."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=callbacks, precision="bf16-mixed", limit_val_batches=0, accelerator="cpu", **quiet
    )
    data = import_module("fashion_mnist").FashionMNIST()
    trainer.fit(module, datamodule=data)
    return trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dense-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    make, weights, kept = (
        import_module("01_prune_and_export").Classifier,
        args.work / "dense.pt",
        args.work / "rows.json",
    )
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    if not weights.exists():
        L.seed_everything(0, verbose=False)
        module = make(lr=0.1)
        rows["dense"] = train(module, args.dense_epochs, [])
        kept.write_text(json.dumps(rows, indent=1))
        torch.save(module.state_dict(), weights)
    for seed in range(args.seeds):
        for name, schedule in SCHEDULES.items():
            if (key := f"{name}, seed {seed}") in rows:
                continue
            L.seed_everything(seed, verbose=False)
            module = make(lr=0.05)
            module.load_state_dict(torch.load(weights, weights_only=True))
            search = ll.ArchitectureSearch(
                [ll.MACs(0.3), ll.Params(0.4)],
                schedule=schedule,
                calibration_batches=1,
                evaluation_batches=2,
                evaluations=4,
                table=args.work / f"table-{seed}.json",
            )
            teacher = ll.KnowledgeDistillation(teacher="self", losses=[ll.SoftTargets(temperature=4.0)])
            rows[key] = train(module, args.epochs, [teacher, search])
            print(key, rows[key], search.result.lines(), flush=True)
            kept.write_text(json.dumps(rows, indent=1))
            (args.work / f"front-{seed}.svg").write_text(svg(search.result.figure("macs")))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
