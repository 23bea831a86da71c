"""Train a small network, then try methods and values on it: accuracy against MACs, and the best trial as YAML.

The space is in configs/space.yaml. Start the script several times with the same ``--storage``, and the processes share
the trials; start it again after an interruption, and it continues. ``python examples/cli.py fit --config
runs/tune/best.yaml`` repeats the best trial. Eleven minutes on one thread of a busy machine.
"""

import argparse
from importlib import import_module
from pathlib import Path

import lightning as L
import torch
from fashion_mnist import FashionMNIST

import lightning_light as ll

SPACE = Path(__file__).parent / "configs" / "space.yaml"


def trained(args: argparse.Namespace) -> L.LightningModule:
    """The dense network: trained once, then read from its checkpoint."""
    L.seed_everything(0, verbose=False)
    module = import_module("01_prune_and_export").Classifier(lr=0.1)
    module.example_input_array = torch.zeros(1, 1, 28, 28)
    weights = args.out / "dense.pt"
    if not weights.exists():
        trainer = L.Trainer(max_epochs=args.dense_epochs, logger=False, enable_checkpointing=False)
        trainer.fit(module, datamodule=FashionMNIST(args.data))
        torch.save(module.state_dict(), weights)
    module.load_state_dict(torch.load(weights, weights_only=True))
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--dense-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2, help="of a trial")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--storage", type=Path, help="an SQLite file; by default study.db in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    result = ll.tune(
        trained(args),
        FashionMNIST(args.data),
        SPACE,
        objectives={"val_accuracy": "max", "macs": "min"},
        trials=args.trials,
        trainer={"max_epochs": args.epochs, "log_every_n_steps": 10},
        storage=args.storage or args.out / "study.db",
    )
    print(result)
    result.figure().savefig(args.out / "pareto.png", dpi=160)
    print(f"Best accuracy: {result.write_config(args.out / 'best.yaml')}")


if __name__ == "__main__":
    main()
