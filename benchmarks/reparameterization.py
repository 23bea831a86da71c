"""Train a CIFAR-10 ResNet on with parallel branches, beside the plain network, and time a step of each.

    python -m benchmarks.reparameterization --data cifar10.npz --weights resnet20_cifar10.pt --epochs 1 --seeds 1

``--epochs 0`` only times steps: processor time of one thread on random images, in turns, median of the ratios to the
plain network. Training is in bfloat16, from the given weights, with a cosine of the learning rate. There is one JSON
file per form and seed, and what is there is not run again.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F

from benchmarks.experiments.harness import RESULTS
from benchmarks.experiments.methods import top1
from benchmarks.experiments.tasks import QUIET, CIFARResNet
from lightning_light.atomic import atomic_write
from lightning_light.reparameterization import (
    ACB,
    DBB,
    OREPA,
    Branches,
    Form,
    Reparameterization,
    RepVGG,
    expand_branches,
    merge_branches,
)

FORMS: dict[str, Form | None] = {
    "plain": None,
    "OREPA": OREPA(),
    "RepVGG": RepVGG(),
    "ACB": ACB(),
    "DBB": DBB(),
    "Branches": Branches(4),
}


def stepper(task: CIFARResNet, form: Form | None, batch: int, layout: torch.memory_format) -> Callable[[], float]:
    """Return a function that makes one optimizer step, and returns its processor time."""
    net = task.untrained().train()
    if form is not None:
        expand_branches(net, None, form)
    net.to(memory_format=layout)
    images, labels = torch.randn(batch, 3, 32, 32).to(memory_format=layout), torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        started = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        return time.process_time() - started

    step()
    return step


def trained(task: CIFARResNet, form: Form | None, epochs: int, seed: int) -> dict[str, Any]:
    """Train with branches, merge them, and test."""
    L.seed_everything(seed, verbose=False)
    module, started = task.module(copy.deepcopy(task.trained(0))), time.process_time()
    module.train().to(memory_format=torch.channels_last)
    callbacks = [] if form is None else [Reparameterization(form)]
    trainer = L.Trainer(max_epochs=epochs, precision="bf16-mixed", callbacks=callbacks, **QUIET)
    trainer.fit(module, task.train_loader())
    seconds = time.process_time() - started
    merge_branches(module)
    settings = {"form": repr(form), "epochs": epochs, "seed": seed, "lr": task.lr}
    return {"settings": settings, "accuracy": top1(module.eval(), task), "training_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=128, help="of the timed steps")
    parser.add_argument("--channels-last", action="store_true", help="layout of the timed steps")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS / "reparameterization")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = CIFARResNet(args.depth, args.data, args.weights, lr=args.lr)
    for seed in range(args.seeds if args.epochs else 0):
        for name in args.forms:
            path = args.results / f"{name}-{args.epochs}-{seed}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as part:
                    found = trained(task, FORMS[name], args.epochs, seed)
                    part.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    steps = {name: stepper(task, FORMS[name], args.batch, layout) for name in ("plain", *args.forms)}
    rounds = [{name: step() for name, step in steps.items()} for _ in range(args.rounds)]
    print("| form | step time / plain | test accuracy | seeds |\n|---|---|---|---|")
    for name in args.forms:
        paths = sorted(args.results.glob(f"{name}-{args.epochs}-*.json"))
        found = [100 * json.loads(path.read_text())["accuracy"] for path in paths]
        accuracy = f"{mean(found):.2f} % ({min(found):.2f} to {max(found):.2f})" if found else ""
        print(f"| {name} | {median(one[name] / one['plain'] for one in rounds):.2f} | {accuracy} | {len(found)} |")


if __name__ == "__main__":
    main()
