"""What a quantized network remembers in its compression_state, and how it is brought back from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.errors import LightningLightError
from lightning_light.example_input import ExampleInput
from lightning_light.quantization.attachment import Attachment, attach
from lightning_light.quantization.operations import HEAVY
from lightning_light.quantization.places import module_of
from lightning_light.quantization.plan import Plan, plan_sites
from lightning_light.quantization.recipes import Recipe
from lightning_light.quantization.record import record
from lightning_light.surgery.attachment import state_of

__all__ = ["METHOD", "attach_from", "begin", "fake_quantized"]

METHOD = "quantization_aware_training"
"""Where in the compression_state the ranges are."""


def begin(state: dict[str, Any], model: nn.Module, example: ExampleInput, recipe: Recipe) -> None:
    """Plan ``model``'s sites into ``state``; nothing is observed yet."""
    operations = record(model, example.args, example.kwargs)
    layers = list(dict.fromkeys(module_of(one.key) for one in operations if one.kind in HEAVY))
    plan = plan_sites(operations, recipe.rules(model, layers))
    state.clear()
    state |= {
        "plan": plan.plain(),
        "ranges": torch.tensor([[torch.inf, -torch.inf]] * len(plan.grids)).reshape(-1, 2),
        "batches": 0,
        "form": "plain",
        "engine": recipe.engine,
        "at_least": 0,
        "learned": {},
    }


def attach_from(
    model: nn.Module, state: dict[str, Any], learned: Mapping[str, Tensor] | None = None
) -> Attachment | None:
    """Hook ``model`` as ``state`` says; None if there is no plan, or nothing in it.

    Args:
        model: that the plan is for.
        state: as `begin` has made it.
        learned: instead of the values that are learned in ``state``: parameters.
    """
    if not state.get("plan", {}).get("weights"):
        return None
    plan = Plan.from_plain(state["plan"])
    if learned is None and state["form"] == "rounded":
        learned = state["learned"]
    attachment = attach(model, plan, state["ranges"], state["engine"], learned, state["at_least"])
    attachment.form = state["form"]
    return attachment


@contextmanager
def fake_quantized(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, ``model`` computes with rounded numbers, as it was trained to.

    Args:
        model: a module that `quantize` was called on or `QuantizationAwareTraining` has trained, in this process or
            loaded by ``lightning_light.load_from_checkpoint``.

    Note:
        A ``copy.deepcopy`` or pickle that is made inside computes with rounded numbers for good. Made outside it has
        the ranges too, and computes with them in a ``with`` of its own.

    Raises:
        LightningLightError: nothing in it has been quantized.
    """
    states = [state for method, state in state_of(model).state.items() if method.startswith(METHOD)]
    attachments = [found for state in states if (found := attach_from(model, state)) is not None]
    if not attachments:
        raise LightningLightError(
            f"`fake_quantized` on `{type(model).__name__}`: expected a module that `quantize` was called on, or that "
            "`QuantizationAwareTraining` has trained, found no ranges in it. Give that module itself, not a part of it "
            "or what wraps it. A checkpoint keeps ranges: load it by `lightning_light.load_from_checkpoint`."
        )
    try:
        yield model
    finally:
        for attachment in attachments:
            attachment.let_go()
