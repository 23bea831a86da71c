"""Quantization without training: ranges from a few batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_light.example_input import ExampleInput
from lightning_light.measure.quiet import uncompiled
from lightning_light.quantization.recipes import Recipe
from lightning_light.quantization.state import METHOD, attach_from, begin
from lightning_light.surgery.journal import attach, release

__all__ = ["quantize"]


def quantize(model: nn.Module, calibration: Iterable[Any], recipe: Recipe) -> nn.Module:
    """Note the ranges of a trained network's numbers, so that it can be rounded and exported as int8.

    Every range holds all that was seen: there is no moving average, since the weights do not move. The network itself
    is as before; within `fake_quantized` it computes with rounded numbers. Where too much accuracy is lost,
    `QuantizationAwareTraining` wins it back.

    Args:
        model: trained; in any mode, on any device.
        calibration: inputs of ``model``: a tensor, a tuple of arguments, or a dict of keyword arguments for each call.
            A hundred training images are a good start; labels are not wanted.
        recipe: how many bits, and by which engine's rules.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no calibration data, or it comes in lists, as from a loader of images and labels; or no
            layer has a weight that can be rounded.

    Example:
        >>> from lightning_light.quantization import Int8, fake_quantized, quantize
        >>> images = torch.randn(4, 3, 8, 8)
        >>> with fake_quantized(quantize(model, [images], Int8())):
        ...     answers = model(images)
    """
    state: dict[str, Any] = {}
    attachment = None
    was = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), uncompiled(model):
            for batch in calibration:
                call = _call_of(batch).to(model)
                if attachment is None:
                    begin(state, model, call, recipe)
                    attachment = attach_from(model, state)
                    model.eval()
                if attachment is None:
                    break
                attachment.observing = True
                model(*call.args, **call.kwargs)
                seen = attachment.observed(torch.device("cpu"))
                state["ranges"] = torch.stack(
                    [
                        torch.minimum(state["ranges"][:, 0], seen[:, 0]),
                        torch.maximum(state["ranges"][:, 1], seen[:, 1]),
                    ],
                    1,
                )
                state["batches"] += 1
    finally:
        if attachment is not None:
            attachment.let_go()
        for module, mode in was.items():
            module.training = mode
    if attachment is None:
        found = "no batch" if not state else "no convolution or linear layer that it can round"
        raise ValueError(
            f"`quantize({type(model).__name__}, calibration, {recipe!r})`: expected inputs to calibrate on and layers "
            f"to round, found {found}. Give a list of tensors, for instance `[images for images, _ in loader]`."
        )
    state["form"] = "rounded"
    attach(model).state[METHOD] = state
    release(model)
    return model


def _call_of(batch: Any) -> ExampleInput:
    if isinstance(batch, list):
        raise ValueError(
            "`quantize(..., calibration)`: expected what the model is called with (a tensor, a tuple, a dict), found a "
            "list, as a loader of images and labels gives it. Write `(images for images, _ in loader)`."
        )
    return ExampleInput.from_array(batch)
