"""Overhead of masks: a training step against no pruning and against Lightning's own callback, side by side.

    python benchmarks/masks.py
    python benchmarks/masks.py --hooks

Every method has its own Trainer in its own thread, and they alternate, never two at once: a step without masks, a step
of one method, a step without masks, a step of the next method, in an order that is shuffled each round. Printed is the
median over rounds of the ratio of a step to the mean of the two steps without masks around it, with its quartiles;
"none again" shows the spread of equal steps. Everything is built several times, because the location of tensors in
memory has an effect too. The clock is CPU time of the thread; freed memory stays with the process (mallopt), to avoid
page faults. Every method masks 80 % of the weights of convolutions and linear layers before the first timed step.

``--hooks`` resolves differences of microseconds: in one run, alternately a step with masking and a step without, on the
same tensors. Masking is the callback with its hook on the optimizer; for Lightning's, the callback and its products of
weights and masks in the forward pass, with their backward pass.
"""

import argparse
import copy
import ctypes
import functools
import itertools
import logging
import random
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_light as ll

WARMUP = 3
MALLOC = {-8: 1, -3: 1 << 30, -1: (1 << 31) - 1}  # glibc: M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, 10),
        )


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
    def __init__(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.net, self.batch = net, batch

    def train_dataloader(self) -> DataLoader[Any]:
        """One batch again and again: twice in the first epoch, in which masks are made."""
        return DataLoader([self.batch] * (2 if self.current_epoch == 0 else 100_000), batch_size=None)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def lightnings(module: Module) -> L.Callback:
    layers = [(m, "weight") for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return ModelPruning(
        "l1_unstructured",
        layers,
        amount=0.8,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
        apply_pruning=lambda epoch: epoch == 0,
        make_pruning_permanent=False,
    )


Way = Callable[[Module], list[L.Callback]]
WAYS: dict[str, Way] = {
    "none again": lambda module: [],
    "WeightPruning": lambda module: [ll.WeightPruning(ll.Sparsity(0.8), schedule=ll.OneShot())],
    "DynamicSparseTraining": lambda module: [ll.DynamicSparseTraining(ll.Sparsity(0.8), method=ll.sparsity.Static())],
    "ModelPruning": lambda module: [lightnings(module)],
}
BETWEEN: dict[str, Way] = {
    "WeightPruning, between two changes": lambda module: [
        ll.WeightPruning(ll.Sparsity(0.8), schedule=ll.sparsity.DenseSparseDense(0.0, 1.0))
    ],
    "DynamicSparseTraining, between two moves": lambda module: [
        ll.DynamicSparseTraining(ll.Sparsity(0.8), method=ll.RigL(), every_n_steps=1000)
    ],
}


class Turns(L.Callback):
    """Times each batch, from hook to hook, and waits for its turn in between."""

    def __init__(self, fit: Callable[["Turns"], None]) -> None:
        self.seconds = 0.0
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(fit,), daemon=True)
        self.alive, self.over = True, False
        self.began = 0.0
        self.trainer: L.Trainer | None = None

    def step(self) -> float:
        """One more batch; returns the seconds that it took."""
        self.thread.start() if self.thread.ident is None else self.go.release()
        self.done.acquire()
        if not self.alive:
            self.thread.join()
            raise SystemExit("A run has ended before its time.")
        return self.seconds

    def end(self) -> None:
        self.over = True
        self.go.release()
        self.thread.join()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 0:
            return
        self.seconds, self.trainer = time.thread_time() - self.began, trainer
        self.done.release()
        self.go.acquire()
        trainer.should_stop = self.over
        self.began = time.thread_time()

    def _run(self, fit: Callable[["Turns"], None]) -> None:
        torch.set_num_threads(1)
        try:
            fit(self)
        finally:
            self.alive = False
            self.done.release()


def runs_of(ways: dict[str, Way], net: nn.Module, batch: int) -> dict[str, Turns]:
    """By way, a run that has not begun, of a copy of ``net``."""
    data = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))

    def fit(build: Way, turns: Turns) -> None:
        module = Module(copy.deepcopy(net), data)
        trainer = L.Trainer(
            max_epochs=2,
            callbacks=[*build(module), turns],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            reload_dataloaders_every_n_epochs=1,
        )
        trainer.fit(module)

    return {name: Turns(functools.partial(fit, build)) for name, build in ways.items()}


def measure(net: nn.Module, batch: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """By way, one entry a round: seconds of a step, and of a step without masks at the same time."""
    runs = runs_of({"none": lambda module: [], **WAYS}, net, batch)
    none = runs.pop("none")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for turn in range(rounds + WARMUP):
        before = none.step()
        for name in random.sample(list(WAYS), len(WAYS)):
            seconds, after = runs[name].step(), none.step()
            if turn >= WARMUP:
                found[name].append((seconds, (before + after) / 2))
            before = after
    for run in (none, *runs.values()):
        run.end()
    return found


def switch_of(trainer: L.Trainer) -> Callable[[bool], None]:
    """Takes out of ``trainer`` what masks, and puts it in again; its tensors stay where they lie."""
    callbacks = trainer.callbacks
    others = [c for c in callbacks if not isinstance(c, (ll.WeightPruning, ll.DynamicSparseTraining, ModelPruning))]
    layers = [module for module in trainer.lightning_module.modules() if hasattr(module, "weight_orig")]
    hooks = [trainer.optimizers[0]._optimizer_step_post_hooks, *(layer._forward_pre_hooks for layer in layers)]
    kept = [dict(registered) for registered in hooks]

    def switch(on: bool) -> None:
        trainer.callbacks = callbacks if on else others
        for registered, back in zip(hooks, kept, strict=True):
            registered.clear()
            registered.update(back if on else {})
        for layer in layers:
            vars(layer)["weight"] = layer.weight_orig  # until a hook puts its product there

    return switch


def measure_hooks(net: nn.Module, rounds: int) -> None:
    """Print, by way, the microseconds that it adds to a step of ``net`` with a batch of one."""
    runs = runs_of({name: build for name, build in (WAYS | BETWEEN).items() if name != "none again"}, net, 1)
    switches: dict[str, Callable[[bool], None]] = {}
    for name, run in runs.items():
        run.step()
        assert run.trainer is not None  # it has stepped
        switches[name] = switch_of(run.trainer)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(rounds + WARMUP):
        for name in random.sample(list(runs), len(runs)):
            seconds = {}
            for on in random.sample([True, False], 2):
                switches[name](on)
                runs[name].step()  # so that the caches are those of the step before
                seconds[on] = runs[name].step()
            if turn >= WARMUP:
                found[name].append((seconds[True], seconds[False]))
    for run in runs.values():
        run.end()
    print("| way | a step without | it adds, lowest tenth | it adds, median |\n|---|---|---|---|")
    for name, pairs in found.items():
        low, low_without = (statistics.quantiles(seconds, n=10)[0] for seconds in zip(*pairs, strict=True))
        print(
            f"| {name} | {1e6 * low_without:.0f} us | {1e6 * (low - low_without):.0f} us | "
            f"{1e6 * statistics.median(own - without for own, without in pairs):.0f} us |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="of the ResNet")
    parser.add_argument("--nets", nargs="*", default=["small", "resnet18"])
    parser.add_argument("--hooks", action="store_true", help="time what is added to a step, on the small network")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        for key, value in MALLOC.items():
            ctypes.CDLL(None).mallopt(key, value)
    if args.hooks:
        measure_hooks(Small(), 100 * args.rounds)
        return
    for name in args.nets:
        print("| network | batch | way | step | against none |\n|---|---|---|---|---|")
        small = name == "small"
        net, batch = (Small(), 64) if small else (ResNet18(), args.batch)
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way, pairs in measure(net, batch, args.rounds * (8 if small else 1)).items():
                found[way] += pairs
        for way, pairs in found.items():
            low, middle, high = statistics.quantiles([100 * (own / none - 1) for own, none in pairs], n=4)
            print(
                f"| {name} | {batch} | {way} | {1e3 * statistics.median(own for own, _ in pairs):.1f} ms | "
                f"{middle:+.1f} % [{low:+.1f}, {high:+.1f}] |",
                flush=True,
            )
        began = time.thread_time()
        ll.prune_weights(net, None, ll.Sparsity(0.8))
        print(f"{name}: choosing all masks takes {1e3 * (time.thread_time() - began):.0f} ms")


if __name__ == "__main__":
    main()
