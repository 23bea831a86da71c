"""What distillation costs, side by side in one process: ratios, not seconds.

``python benchmarks/distillation.py``: real Trainers, one for each way, take their steps in turns: each in a thread of
its own, of which one runs at a time. So every round has one step of each way within a fraction of a second, and other
load on the machine meets them alike. One thread of torch, and its processor time. Printed are medians of the ratios of
rounds, with quartiles:

- step: distilled step / (the student's step + the teacher's forward under inference mode), goal 1.05;
- by hand: a step with the same distillation written in ``training_step`` / the same, for comparison;
- step / by hand: what the callback adds;
- cached: a step of the second epoch with a cache / the student's step, goal 1.05.

glibc gives pages back after each step and asks for them in the next one. What that costs depends on what else the
machine does, and is more where a step holds more: on a busy machine up to a sixth of the step, also by hand. So the
program restarts itself with an allocator that keeps its pages; ``--default-malloc`` does not.

Then the peak of memory: bytes that torch's allocator holds more than at the beginning of a step, as its profiler counts
them, at the most within the step; the ratios are of the same ways.
"""

import argparse
import logging
import os
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
from nets import CIFARResNet
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from lightning_light.distillation import KnowledgeDistillation, TeacherCache

KEEPING = {
    "MALLOC_ARENA_MAX": "1",  # one for all threads
    "MALLOC_TRIM_THRESHOLD_": str(2**33),  # bytes at the top that stay
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # bytes from which on a block is mapped for itself
    "OMP_NUM_THREADS": "1",
}


class Student(L.LightningModule):
    """Trained alone, or, with a teacher, by distillation written by hand."""

    def __init__(self, depth: int, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.net = CIFARResNet(depth)
        vars(self)["teacher"] = teacher

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        student = self(batch[0])
        loss = F.cross_entropy(student, batch[1])
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher = self.teacher(batch[0])
        p, q = F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1)
        return loss + F.kl_div(p, q, reduction="batchmean") * 4 * 4

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Turns(L.Callback):
    """Times the steps of one way, and lets the other ways have theirs in between."""

    def __init__(self, turn: threading.Semaphore, done: threading.Semaphore) -> None:
        self.turn, self.done = turn, done
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.turn.acquire()
        self.seconds.append(-time.thread_time())

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds[-1] += time.thread_time()
        self.done.release()


class Memory(L.Callback):
    """The peak of memory within one step."""

    def __init__(self, step: int) -> None:
        self.step, self.peak = step, 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self._profile.start()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step + 1:
            self._profile.stop()
            self.peak = peak(self._profile)


def peak(profiled: Any) -> int:
    """The most bytes held at a time, counted from the beginning."""
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def fit(args: argparse.Namespace, student: Student, callbacks: list[Any], epochs: int) -> None:
    """One run."""
    torch.set_num_threads(1)  # a setting of each thread
    labels = torch.arange(args.batch * args.steps) % 10
    data = TensorDataset(torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(0)), labels)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(student, DataLoader(data, args.batch))


def forward(teacher: nn.Module, images: Tensor) -> None:
    """What the teacher costs at least."""
    with torch.inference_mode():
        teacher(images)


def ways(args: argparse.Namespace, teacher: nn.Module) -> dict[str, Callable[[], tuple[Student, list[Any]]]]:
    """A student and its callbacks, for each way to train it."""
    return {
        "alone": lambda: (Student(args.student), []),
        "step": lambda: (Student(args.student), [KnowledgeDistillation(teacher)]),
        "by hand": lambda: (Student(args.student, teacher), []),
        "cached": lambda: (Student(args.student), [KnowledgeDistillation(teacher, cache=TeacherCache())]),
    }


def seconds(args: argparse.Namespace, teacher: nn.Module) -> dict[str, list[float]]:
    """Of each step of the second epoch, way by way, and of the teacher's forward."""
    done, images = threading.Semaphore(0), torch.randn(args.batch, 3, 32, 32)
    turns, threads = {}, []
    for name, make in ways(args, teacher).items():
        student, callbacks = make()
        turns[name] = Turns(threading.Semaphore(0), done)
        given = (args, student, [turns[name], *callbacks], 2)
        threads.append(threading.Thread(target=fit, args=given, daemon=True))
    for thread in threads:
        thread.start()
    found: list[float] = []
    for step in range(2 * args.steps):
        order = list(turns)[step % len(turns) :] + list(turns)[: step % len(turns)]
        for name in order:  # each way is the first as often as the others
            turns[name].turn.release()
            done.acquire()
        start = time.thread_time()
        forward(teacher, images)
        found.append(time.thread_time() - start)
    for thread in threads:
        thread.join()
    return {name: turn.seconds[args.steps :] for name, turn in turns.items()} | {"forward": found[args.steps :]}


def peaks(args: argparse.Namespace, teacher: nn.Module) -> dict[str, list[float]]:
    """Bytes, way by way, in the second step of the second epoch; and those of the teacher's forward."""
    found = {}
    for name, make in ways(args, teacher).items():
        student, callbacks = make()
        memory = Memory(args.steps + 1)
        fit(args, student, [memory, *callbacks], 2)
        found[name] = [float(memory.peak)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward(teacher, torch.randn(args.batch, 3, 32, 32))
    return {**found, "forward": [float(peak(profiled))]}


def show(what: str, found: dict[str, list[float]]) -> None:
    """The ratios of the rounds."""
    rounds = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    for name in ("step", "by hand", "step / by hand", "cached"):
        if name == "step / by hand":
            ratios = [r["step"] / r["by hand"] for r in rounds]
        else:
            ratios = [r[name] / (r["alone"] + (0.0 if name == "cached" else r["forward"])) for r in rounds]
        line = f"{what:7s} {name:15s} {statistics.median(ratios):.3f}"
        if len(ratios) > 1:
            low, _, high = statistics.quantiles(ratios, n=4)
            line += f"  quartiles {low:.3f} to {high:.3f}, {len(ratios)} rounds"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=int, default=8, help="depth of the CIFAR ResNet")
    parser.add_argument("--teacher", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="of an epoch; those of the second are counted")
    parser.add_argument("--default-malloc", action="store_true")
    args = parser.parse_args()
    if not args.default_malloc and not KEEPING.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEPING})
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    teacher = CIFARResNet(args.teacher).eval()
    show("time", seconds(args, teacher))
    args.steps = 4
    show("memory", peaks(args, teacher))


if __name__ == "__main__":
    main()
