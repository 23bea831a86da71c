"""`AddedLoss`: base class of methods that add a loss to the one that ``training_step`` returns.

The loss is added inside autocast and before Lightning divides by the number of accumulated batches, bit for bit as
hand-written code does, also under DDP and with a gradient scaler. In manual optimization it is added in
``manual_backward``, before the loss is scaled.
"""

from __future__ import annotations

import functools
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_light.callback import CompressionCallback
from lightning_light.distillation.student_hook import StudentHook
from lightning_light.host.patches import InstancePatch, wrap_method

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["AddedLoss"]


class AddedLoss(CompressionCallback):
    """Add a loss that is computed from a call of the network to that of ``training_step``.

    A subclass sets `student_hook` and calls `patch_steps` for each fit, and undoes the patches in ``teardown``.
    """

    student_hook: StudentHook
    """What records the calls of the network, which it does while the user's step runs."""

    def adds_loss(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether this step has the loss; called before the user's step."""
        return True

    @abstractmethod
    def added_loss(self, trainer: Trainer, pl_module: LightningModule, task: Tensor) -> Tensor | None:
        """Compute the loss from the recorded call; None if there is none.

        Args:
            trainer: the Trainer.
            pl_module: the live module.
            task: the loss of the user's step.
        """

    @abstractmethod
    def check_called(self, pl_module: LightningModule) -> None:
        """Raise an error if no step of this fit has called the network."""

    def record(self, enabled: bool) -> None:
        """Start or stop recording within ``training_step``."""
        self.student_hook.enabled = enabled

    def patch_steps(self, trainer: Trainer, pl_module: LightningModule) -> list[InstancePatch]:
        """Wrap ``training_step`` and, in manual optimization, ``manual_backward``; hooks have been added before."""
        step = functools.partial(self._training_step, trainer, pl_module)
        patches = [wrap_method(pl_module, "training_step", step)]
        if not pl_module.automatic_optimization:
            backward = functools.partial(self._manual_backward, trainer, pl_module)
            patches.append(wrap_method(pl_module, "manual_backward", backward))
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code does not call hooks that were added later
        return patches

    def _training_step(
        self, trainer: Trainer, pl_module: LightningModule, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run the user's ``training_step`` and add the loss to its own."""
        is_on = self.adds_loss(trainer, pl_module)
        self.record(is_on)
        try:
            output = original(*args, **kwargs)
        finally:
            self.record(False)
        if is_on and pl_module.automatic_optimization:
            output = self._with_loss(trainer, pl_module, output)
        elif is_on:
            self.check_called(pl_module)
        self.student_hook.calls.clear()
        return output

    def _with_loss(self, trainer: Trainer, pl_module: LightningModule, output: Any) -> Any:
        """Add the loss to the output of ``training_step``, of which None skips the step; a dict is not changed."""
        loss = output["loss"] if isinstance(output, Mapping) else output
        if loss is None:
            return output
        extra = self.added_loss(trainer, pl_module, loss)
        if extra is None:
            self.check_called(pl_module)
            return output
        return {**output, "loss": loss + extra} if isinstance(output, Mapping) else loss + extra

    def _manual_backward(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        original: Callable[..., Any],
        loss: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Add the loss in the first backward after a call of the network."""
        extra = self.added_loss(trainer, pl_module, loss)
        original(loss if extra is None else loss + extra, *args, **kwargs)
