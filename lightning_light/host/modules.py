"""Read and change what Lightning keeps on a LightningModule or LightningDataModule under private names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_light.host.patches import InstancePatch

__all__ = [
    "BUILDER",
    "RUN_STATE",
    "STEP_AS_FORWARD",
    "add_hparams",
    "name_loader",
    "compiled_methods",
    "is_step_call",
    "logs_hparams",
    "trainer_of",
]

BUILDER = "_instantiator"
"""The hyper-parameter, and the argument of ``load_from_checkpoint``, that names what builds the module."""

RUN_STATE = ("_trainer", "_fabric")
"""Attributes of a LightningModule that belong to the run, not to the network."""

STEP_AS_FORWARD = "_step_as_forward"
"""The qualified name of a ``forward`` that this package replaced by a step of the module."""


def trainer_of(module: nn.Module) -> Any:
    """Return the Trainer that ``module`` is attached to, or None."""
    return getattr(module, "_trainer", None)


def is_step_call(module: nn.Module) -> bool:
    """Check whether the running call of ``module`` is one of its steps: DDP, and a trace of the training
    step, call them through a patched ``forward``.

    The arguments of such a call are those of the step, not those of ``forward``.
    """
    return getattr(vars(module).get("forward"), "__qualname__", "").startswith(("_ForwardRedirection", STEP_AS_FORWARD))


def compiled_methods(module: nn.Module) -> dict[str, Any]:
    """Map the methods that ``torch.compile(module)`` replaced, when a Trainer was given that, to the originals."""
    context = vars(module).get("_compiler_ctx") or {}
    methods = ((key.removeprefix("original_"), value) for key, value in context.items() if key.startswith("original_"))
    return {name: method for name, method in methods if name in vars(module)}


def name_loader(module: Any, checkpoint: dict[str, Any], loader: str) -> None:
    """Let ``cls.load_from_checkpoint`` of Lightning fail with an error that has ``loader`` in it.

    Lightning refuses a checkpoint that names what builds the module, unless it is its own command line's.
    """
    key = module.CHECKPOINT_HYPER_PARAMS_KEY
    hparams = checkpoint.get(key, {})
    as_one = checkpoint.get(module.CHECKPOINT_HYPER_PARAMS_NAME, "kwargs") != "kwargs"  # given to one argument, whole
    if isinstance(hparams, dict) and BUILDER not in hparams and not as_one:
        checkpoint[key] = {**hparams, BUILDER: loader}


def logs_hparams(owner: Any) -> bool:
    """Check whether Lightning logs the hyper-parameters of a LightningModule or LightningDataModule."""
    return owner is not None and owner._log_hyperparams


def add_hparams(owner: Any, hparams: Mapping[str, Any]) -> InstancePatch:
    """Add ``hparams`` to those that Lightning logs for ``owner``; what a checkpoint stores is another copy."""
    return InstancePatch(owner, "_hparams_initial", {**owner.hparams_initial, **hparams})
