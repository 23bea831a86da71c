"""What keeping masks costs: a training step against no pruning and against Lightning's own callback, side by side.

    python benchmarks/masks.py

Each round runs one step of every way in a shuffled order, in one process; what is printed is the median over rounds of
the ratio to the step without masks, with its quartiles. CPU time of the thread, not wall time: other processes count
less. Every way masks 80 % of the weights of convolutions and linear layers, once, before the timing.
"""

import argparse
import copy
import itertools
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(4),
            nn.Flatten(), nn.Linear(64 * 16, 10),
        )  # fmt: skip


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Sequential):
    """For 32 x 32 images: 11 million parameters at width 64."""

    def __init__(self, width: int = 64) -> None:
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            blocks += [Block(inputs, outputs, 1 if place == 0 else 2), Block(outputs, outputs, 1)]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


class Module(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def lightnings(module: Module) -> L.Callback:
    layers = [(m, "weight") for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return ModelPruning(
        "l1_unstructured", layers, amount=0.8, use_global_unstructured=True, use_lottery_ticket_hypothesis=False,
        apply_pruning=lambda epoch: epoch == 0, make_pruning_permanent=False,
    )  # fmt: skip


WAYS: dict[str, Callable[[Module], list[L.Callback]]] = {
    "none": lambda module: [],
    "none again": lambda module: [],
    "WeightPruning": lambda module: [ll.WeightPruning(ll.Sparsity(0.8), schedule=ll.OneShot())],
    "DynamicSparseTraining": lambda module: [ll.DynamicSparseTraining(ll.Sparsity(0.8), method=ll.Static())],
    "ModelPruning": lambda module: [lightnings(module)],
}


class Stepper(L.Callback):
    """Runs a Trainer's fit in a generator's place: times each batch, hook to hook, and hands over in between."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.thread_time() - self.began)
        self.began = time.thread_time()

    def on_train_epoch_start(self, *_: Any) -> None:
        self.began = time.thread_time()


def measure(net: nn.Module, batch: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step, by way, one entry a round: the median of ``steps`` steps of one epoch."""
    data = TensorDataset(torch.randn(batch * steps, 3, 32, 32), torch.randint(10, (batch * steps,)))
    runs: dict[str, tuple[L.Trainer, Module, Stepper]] = {}
    for name, build in WAYS.items():
        module, stepper = Module(copy.deepcopy(net)), Stepper()
        trainer = L.Trainer(
            max_epochs=1, callbacks=[*build(module), stepper], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        runs[name] = trainer, module, stepper
        trainer.fit(module, DataLoader(data, batch))  # masks are made here: not timed
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name in random.sample(list(WAYS), len(WAYS)):
            trainer, module, stepper = runs[name]
            stepper.times.clear()
            trainer.fit_loop.max_epochs += 1
            trainer.fit(module, DataLoader(data, batch))
            found[name].append(statistics.median(stepper.times[1:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="of the ResNet")
    parser.add_argument("--nets", nargs="*", default=["small", "resnet18"])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| network | batch | way | step | against none |\n|---|---|---|---|---|")
    for name in args.nets:
        small = name == "small"
        net, batch = (Small(), 64) if small else (ResNet18(), args.batch)
        found = measure(net, batch, args.rounds * (2 if small else 1), args.steps * (4 if small else 1))
        for way, times in found.items():
            ratios = [100 * (own / none - 1) for own, none in zip(times, found["none"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            print(f"| {name} | {batch} | {way} | {1e3 * statistics.median(times):.1f} ms | "
                  f"{middle:+.1f} % [{low:+.1f}, {high:+.1f}] |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
