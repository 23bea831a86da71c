"""What distillation costs, side by side in one process: ratios, not seconds.

``python benchmarks/distillation.py``: steps of a real Trainer with and without the callback, alternating in blocks, and
between them the teacher's forward pass under inference mode. One thread and its processor time, so that other
load on the machine counts little. Of a block the fastest step counts. Printed are medians
of the ratios of blocks, with quartiles:

- step: distilled step / (the student's step + the teacher's forward), goal 1.05;
- cached: a step of the second epoch with a cache / the student's step, goal 1.05.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from nets import CIFARResNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_light.distillation import KnowledgeDistillation


class Student(L.LightningModule):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.net = CIFARResNet(depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Clock(L.Callback):
    """When each batch began and ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.process_time() - self._start)


def steps(args: argparse.Namespace, teacher: nn.Module | None, cache: str | None = None) -> float:
    """The least seconds of a step; with a cache, of the second epoch."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(args.batch * args.steps, 3, 32, 32), torch.randint(10, (args.batch * args.steps,)))
    clock = Clock()
    callbacks: list[Any] = [clock] if teacher is None else [clock, KnowledgeDistillation(teacher=teacher, cache=cache)]
    trainer = L.Trainer(
        max_epochs=1 if cache is None else 2, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Student(args.student), DataLoader(data, args.batch))
    return min(clock.times[-args.steps :][1:])


def forwards(args: argparse.Namespace, teacher: nn.Module) -> float:
    """The least seconds of the teacher's forward pass under inference mode."""
    images, times = torch.randn(args.batch, 3, 32, 32), []
    with torch.inference_mode():
        for _ in range(args.steps):
            start = time.process_time()
            teacher(images)
            times.append(time.process_time() - start)
    return min(times[1:])


def show(name: str, measure: Callable[[], float], blocks: int) -> None:
    found = sorted(measure() for _ in range(blocks))
    low, high = found[len(found) // 4], found[(3 * len(found)) // 4]
    print(f"{name:8s} median {statistics.median(found):.3f}  quartiles {low:.3f} to {high:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=int, default=8, help="depth of the CIFAR ResNet")
    parser.add_argument("--teacher", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="of a block")
    parser.add_argument("--blocks", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = CIFARResNet(args.teacher).eval()
    show("step", lambda: steps(args, teacher) / (steps(args, None) + forwards(args, teacher)), args.blocks)
    show("cached", lambda: steps(args, teacher, cache="memory") / steps(args, None), args.blocks)


if __name__ == "__main__":
    main()
