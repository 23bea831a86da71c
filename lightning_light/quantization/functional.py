"""Quantization without training: ranges from a few batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.errors import NoEffectWarning
from lightning_light.example_input import ExampleInput
from lightning_light.measure.isolation import isolated, uncompiled
from lightning_light.quantization.attachment import Attachment
from lightning_light.quantization.observers import MinMax, MovingAverage
from lightning_light.quantization.parameters import first_values
from lightning_light.quantization.plan import Plan
from lightning_light.quantization.post_training.adaround import AdaRound
from lightning_light.quantization.post_training.calibration import (
    calls_from,
    check_calibration,
    explained,
    first_of,
)
from lightning_light.quantization.post_training.equalization import equalize as equalize_layers
from lightning_light.quantization.post_training.refinement import Refinement
from lightning_light.quantization.recipes import Recipe
from lightning_light.quantization.rounding import merge
from lightning_light.quantization.state import METHOD, attach_from, begin
from lightning_light.surgery.attachment import attach, release

__all__ = ["quantize"]


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    recipe: Recipe,
    *,
    equalize: bool = False,
    correct_bias: bool = False,
    rounding: AdaRound | None = None,
    progress_bar: bool = True,
) -> nn.Module:
    """Note the ranges of a trained network's numbers, so that it can be rounded and exported with few bits.

    There is no moving average, since the weights do not move: where the recipe says `MovingAverage` or `MinMax` a range
    holds all that was seen, and what other observers find is the mean over the batches. Within `fake_quantized` the
    network computes with rounded numbers. Where too much accuracy is lost, three options change the weights to win
    some back, and ``QuantizationAwareTraining(recipe, start=0.0)`` goes on from what this has found. Without options
    the network itself is as before.

    Args:
        model: trained; in any mode, on any device.
        calibration: inputs of ``model``: a tensor, a tuple of arguments, or a dict of keyword arguments for each call.
            A hundred training images are a good start, a thousand for ``rounding``; labels are not wanted.
        recipe: how many bits, and by which engine's rules.
        equalize: before all else, let layers in a row share out their ranges, channel by channel; the network computes
            what it did. It goes through batch norm, ReLU and leaky ReLU, not through ReLU6. It is for networks of
            depthwise convolutions, whose channels have ranges that are far apart.
        correct_bias: put right the mean of every channel, which rounding has moved, layer by layer. It is added to the
            bias of the layer or of its batch norm.
        rounding: learn which weights to round up and which down, layer by layer: ``AdaRound()``. The weights are
            placed on the grid that they will be rounded to.
        progress_bar: whether a terminal shows how far ``correct_bias`` and ``rounding`` have come.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no calibration data, the model cannot be called with it, it comes in lists, as from a
            loader of images and labels, or numbers in the network are not finite; or no layer has a weight that can
            be rounded. As after any other error, ``model`` is then as it was.
        TypeError: ``recipe`` is no recipe, ``rounding`` no `AdaRound`, or ``calibration`` no iterable of batches.

    Warns:
        NoEffectWarning: an option has found nothing to do, or not for all layers, which are named.

    Example:
        >>> from lightning_light.quantization import Int8, fake_quantized, quantize
        >>> images = torch.randn(4, 3, 8, 8)
        >>> with fake_quantized(quantize(model, [images], Int8(), equalize=True)):
        ...     answers = model(images)
    """
    check_calibration("quantize", model, calibration)
    _check_values(model, recipe, rounding)
    inputs = calls_from("quantize", model, calibration)
    state: dict[str, Any] = {}
    changes = equalize or correct_bias or rounding is not None
    with _restored_on_failure(model, changes), torch.no_grad(), uncompiled(model):
        if changes:
            examples = list(inputs)
            inputs = iter(examples)
        first = first_of("quantize", model, inputs)
        with isolated(model), explained("quantize", model, first):
            model(*first.args, **first.kwargs)
        model.eval()
        if equalize and not equalize_layers(model, first):
            _warn("equalize=True", "no two layers in a row with nothing but batch norm, ReLU and pooling between them")
        begin(state, model, first, recipe)
        attachment = attach_from(model, state)
        if attachment is None:
            raise ValueError(
                f"`quantize({type(model).__name__}, calibration, {recipe!r})`: expected layers to round, found no "
                f"convolution or linear layer that can be; left float: {state['plan']['left_float'] or 'none'}. Give "
                "the part of the network that has some, or keep less float."
            )
        try:
            _observe(model, attachment, state, _chain(first, inputs))
            state["form"], state["recipe"] = "rounded", repr(recipe)
            state["layers"] = attachment.plan.bits_of_layers()
            attachment.form = "rounded"
            state["learned"] |= attachment.first_steps | first_values(attachment.grids, attachment.scales)
            attachment.learned = state["learned"]
            if correct_bias or rounding is not None:
                refinement = Refinement(model, attachment, examples, rounding, correct_bias, state["learned"])
                refinement.run(progress_bar=progress_bar)
                _tell(refinement)
        finally:
            attachment.let_go()
    attach(model).state[METHOD] = state
    release(model)
    return model


def _observe(model: nn.Module, attachment: Attachment, state: dict[str, Any], inputs: Iterable[ExampleInput]) -> None:
    attachment.observing = True
    wide = [isinstance(grid.observer, MinMax | MovingAverage) for grid in attachment.grids]
    widest = torch.tensor(wide, dtype=torch.bool)
    for batch, call in enumerate(inputs):
        with explained("quantize", model, call):
            model(*call.args, **call.kwargs)
        shares = torch.where(widest, torch.nan, 1 / (batch + 1))
        seen = attachment.observed(torch.device("cpu"))
        _check_finite(attachment.plan, seen, batch)
        state["ranges"] = merge(state["ranges"], seen, shares)
        state["batches"] += 1
    attachment.observing = False
    attachment.use(state["ranges"])


@contextmanager
def _restored_on_failure(model: nn.Module, changes: bool) -> Iterator[None]:
    """Training modes are as before in any case, parameters that the block ``changes`` if it raises."""
    modes = {module: module.training for module in model.modules()}
    before = {parameter: parameter.detach().clone() for parameter in model.parameters() if changes}
    done = False
    try:
        yield
        done = True
    finally:
        for module, mode in modes.items():
            module.training = mode
        if not done:
            with torch.no_grad():
                for parameter, value in before.items():
                    parameter.copy_(value)


def _check_finite(plan: Plan, seen: Tensor, batch: int) -> None:
    """What has not been seen is (inf, -inf)."""
    bad = seen.isnan().any(1) | (seen[:, 0] == -torch.inf) | (seen[:, 1] == torch.inf)
    if not bad.any():
        return
    (found, *_) = plan.sites_of([int(bad.nonzero()[0])])
    raise ValueError(
        f"`quantize(..., calibration)`: expected finite numbers, found others in batch {batch}, at "
        f"`{found or 'the network itself'}`. Look in the batch and in the weights: "
        "`torch.isfinite(x).all()`."
    )


def _check_values(model: nn.Module, recipe: Any, rounding: Any) -> None:
    call = f"quantize({type(model).__name__}, calibration"
    if not isinstance(recipe, Recipe):
        raise TypeError(f"`{call}, {recipe!r})`: expected a recipe, found {type(recipe).__name__}. Write `Int8()`.")
    if rounding is not None and not isinstance(rounding, AdaRound):
        raise TypeError(
            f"`{call}, ..., rounding={rounding!r})`: expected `AdaRound()` or None, found {type(rounding).__name__}. "
            "Write `rounding=AdaRound()`."
        )


def _chain(first: ExampleInput, others: Iterable[ExampleInput]) -> Iterator[ExampleInput]:
    yield first
    yield from others


def _tell(refinement: Refinement) -> None:
    if refinement.nearest:
        _warn(
            "rounding=AdaRound(...)",
            f"weights that are computed, used twice or not uniform: {_once(refinement.nearest)}",
        )
    if refinement.uncorrected:
        _warn("correct_bias=True", f"no bias in {_once(refinement.uncorrected)}, nor in a batch norm after it")


def _once(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _warn(option: str, found: str) -> None:
    warnings.warn(f"`quantize(..., {option})` has left layers as they were: {found}.", NoEffectWarning, stacklevel=3)
