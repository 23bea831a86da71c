"""What an experiment does to a network: before, during and after training."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_light as ll
from benchmarks.experiments.tasks import CIFARResNet, Task
from lightning_light.criteria import Criterion
from lightning_light.structured import Widths

CALIBRATION_BATCHES = 10
"""For every criterion and peer that reads data, except `LearnedGates`, which reads one batch per step."""


@dataclass
class Run:
    """One seed of one experiment.

    Attributes:
        task: network and data.
        module: what is trained; its ``net`` starts with the weights of ``dense``.
        dense: the network before compression, a copy.
        exportable: whether the result can be written to an ONNX file, and its layers counted.
    """

    task: Task
    module: L.LightningModule
    dense: nn.Module
    exportable: bool = True


@dataclass(frozen=True)
class Method:
    """Train on without any compression; the base of all methods."""

    def prepare(self, run: Run) -> None:
        """Change ``run.module`` before training."""

    def callbacks(self, run: Run) -> list[L.Callback]:
        """Return callbacks for the training."""
        return []

    def finish(self, run: Run) -> None:
        """Change ``run.module`` after training, to what is deployed."""

    def deployed(self, run: Run) -> AbstractContextManager[Any]:
        """Inside, ``run.module`` computes what is deployed."""
        return nullcontext()


@dataclass(frozen=True)
class Callbacks(Method):
    """Train with callbacks of this package.

    Args:
        given: copied for each run.
        teacher: whether the dense network is the teacher, with the default loss.
        quantized: whether one of them quantizes.
    """

    given: Sequence[L.Callback]
    teacher: bool = False
    quantized: bool = False

    def callbacks(self, run: Run) -> list[L.Callback]:
        return [*teachers(run, self.teacher), *copy.deepcopy(list(self.given))]

    def finish(self, run: Run) -> None:
        ll.merge_branches(run.module)

    def deployed(self, run: Run) -> AbstractContextManager[Any]:
        return ll.fake_quantized(run.module) if self.quantized else nullcontext()


@dataclass(frozen=True)
class PruneChannels(Method):
    """Prune in one cut with `prune_channels`, then train on."""

    budget: ll.budgets.Budget
    criterion: Criterion = field(default_factory=ll.Magnitude)
    teacher: bool = False

    def prepare(self, run: Run) -> None:
        ll.prune_channels(
            run.module,
            run.task.example,
            self.budget,
            criterion=self.criterion,
            data=run.task.train_loader(),
            calibration_batches=CALIBRATION_BATCHES,
            loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
            **self.options(),
        )

    def options(self) -> dict[str, Any]:
        """Return further arguments of `prune_channels`."""
        return {}

    def callbacks(self, run: Run) -> list[L.Callback]:
        return teachers(run, self.teacher)


@dataclass(frozen=True)
class PruneWithinWidths(PruneChannels):
    """Prune in one cut with bounds on the widths of layers, then train on."""

    widths: Widths = field(default_factory=Widths)

    def options(self) -> dict[str, Any]:
        return {"widths": self.widths}


@dataclass(frozen=True)
class PruneUnderLargerTeacher(PruneChannels):
    """Prune in one cut with `prune_channels`, then train on with `CIFARResNet.larger` as teacher."""

    def callbacks(self, run: Run) -> list[L.Callback]:
        assert isinstance(run.task, CIFARResNet)
        return [ll.KnowledgeDistillation(run.task.larger())]


@dataclass(frozen=True)
class Quantize(Method):
    """Train on, then quantize with `quantize`."""

    recipe: ll.recipes.Recipe

    def finish(self, run: Run) -> None:
        images = [images for images, _ in run.task.batches(CALIBRATION_BATCHES)]
        ll.quantize(run.module, run.task.example, self.recipe, data=images, progress_bar=False)

    def deployed(self, run: Run) -> AbstractContextManager[Any]:
        return ll.fake_quantized(run.module)


@dataclass(frozen=True)
class Student(Method):
    """Train a narrower CNN from scratch, alone or with the dense network as teacher."""

    width: int
    teacher: bool = False

    def prepare(self, run: Run) -> None:
        run.module = run.task.module(type(run.dense)(self.width))

    def callbacks(self, run: Run) -> list[L.Callback]:
        return teachers(run, self.teacher)


def teachers(run: Run, wanted: bool) -> list[L.Callback]:
    """Return the callback that distills from the dense network, if it is wanted."""
    return [ll.KnowledgeDistillation(run.dense)] if wanted else []


def logits_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute the loss of Hinton et al., 2015, by hand."""
    logs = [F.log_softmax(logits / temperature, 1) for logits in (student, teacher)]
    return temperature**2 * F.kl_div(*logs, reduction="batchmean", log_target=True)


@torch.no_grad()
def top1(call: Any, task: Task) -> float:
    """Return the accuracy of ``call`` on the whole test set."""
    right = [(call(images).argmax(1) == labels).sum() for images, labels in task.test_loader()]
    return float(torch.stack(right).sum()) / len(task.test_loader().dataset)  # type: ignore[arg-type]
