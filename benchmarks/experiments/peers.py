"""The same experiments with other packages."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch
import torch.nn.functional as F
import torch_pruning as tp
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.nn.utils import prune

from benchmarks.experiments.methods import CALIBRATION_BATCHES, Method, Run, Student, logits_loss
from lightning_light.measure import count_cost


@dataclass(frozen=True)
class TorchPruning(Method):
    """Prune in one cut with torch-pruning's pruner and global ranking, then train on.

    torch-pruning takes a ratio of channels; the ratio for ``remaining`` MACs is found by bisection.

    Args:
        importance: class of ``torch_pruning.importance``, called without arguments.
        remaining: share of the MACs.
        gradients: whether the importance reads gradients; they are summed over the calibration batches.
    """

    importance: type[tp.importance.Importance]
    remaining: float
    gradients: bool = False

    def prepare(self, run: Run) -> None:
        batches = list(run.task.batches(CALIBRATION_BATCHES))
        example, dense = run.task.example, run.module.net
        goal = self.remaining * count_cost(dense, (example,)).macs
        low, high = 0.0, 0.9
        for _ in range(10):
            middle = (low + high) / 2
            macs = count_cost(self._pruned(dense, middle, example, batches), (example,)).macs
            low, high = (middle, high) if macs > goal else (low, middle)
        run.module.net = self._pruned(dense, high, example, batches)

    def _pruned(self, net: nn.Module, ratio: float, example: Tensor, batches: list) -> nn.Module:
        net = copy.deepcopy(net).eval()
        if self.gradients:
            for images, labels in batches:
                F.cross_entropy(net(images), labels).backward()
        last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
        attentions = [module for module in net.modules() if isinstance(module, nn.MultiheadAttention)]
        pruner = tp.pruner.BasePruner(
            net,
            example,
            importance=self.importance(),
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,
            ignored_layers=[last],
            in_channel_groups={},
            out_channel_groups={},
            num_heads={attention: attention.num_heads for attention in attentions},
        )
        pruner.step()
        net.zero_grad(set_to_none=True)
        return net.train()


@dataclass(frozen=True)
class LightningModelPruning(Method):
    """Mask weights with Lightning's `ModelPruning`, globally by magnitude, after the first epoch."""

    amount: float

    def callbacks(self, run: Run) -> list[L.Callback]:
        return [
            ModelPruning(
                "l1_unstructured",
                parameters_to_prune=weights(run.module),
                amount=self.amount,
                use_global_unstructured=True,
                use_lottery_ticket_hypothesis=False,
                apply_pruning=lambda epoch: epoch == 0,
            )
        ]


@dataclass(frozen=True)
class TorchPrune(Method):
    """Mask weights with `torch.nn.utils.prune`, globally by magnitude, before training."""

    amount: float

    def prepare(self, run: Run) -> None:
        prune.global_unstructured(weights(run.module), prune.L1Unstructured, amount=self.amount)

    def finish(self, run: Run) -> None:
        for module, name in weights(run.module):
            prune.remove(module, name)


@dataclass(frozen=True)
class FXQuantization(Method):
    """Fake-quantize with ``prepare_qat_fx`` for x86, train on, and convert to int8 kernels of torch."""

    def prepare(self, run: Run) -> None:
        mapping = get_default_qat_qconfig_mapping("x86")
        run.module.net = prepare_qat_fx(run.module.net.train(), mapping, (run.task.example,))

    def finish(self, run: Run) -> None:
        run.exportable = False
        torch.backends.quantized.engine = "x86"
        run.module.net = convert_fx(run.module.net.eval())


@dataclass(frozen=True)
class HandWrittenDistillation(Student):
    """Train the narrower CNN with a hand-written distillation loss in the training step."""

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        run.module.training_step = _with_teacher(run.module, run.dense)


def weights(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the weights that are masked: of all convolutions and linear layers."""
    return [(layer, "weight") for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def _with_teacher(module: L.LightningModule, teacher: nn.Module) -> Callable[[tuple[Tensor, Tensor], int], Tensor]:
    def training_step(batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = module(batch[0])
        with torch.no_grad():
            target = teacher(batch[0])
        return F.cross_entropy(logits, batch[1], label_smoothing=0.1) + logits_loss(logits, target)

    return training_step
