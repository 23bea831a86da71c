"""Post-training quantization: ranges from calibration batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.calibration import calls_from, explained
from lightning_light.copies import copy_network
from lightning_light.errors import NoEffectWarning
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated
from lightning_light.order import Stage
from lightning_light.quantization.checkpoint_state import METHOD, attach_fake_quantizer, begin, enable, merge
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.observers import MinMax, MovingAverage
from lightning_light.quantization.plan import QuantizationPlan
from lightning_light.quantization.post_training.equalization import equalize as equalize_layers
from lightning_light.quantization.post_training.refinement import AdaRound, Refinement
from lightning_light.quantization.recipes import Recipe
from lightning_light.surgery.attachment import attach, release
from lightning_light.validation import validated

__all__ = ["quantize"]


@validated
def quantize(
    model: nn.Module,
    example_inputs: Any,
    recipe: Recipe,
    *,
    data: Iterable[Any] | None = None,
    equalize: bool = False,
    correct_bias: bool = False,
    rounding: AdaRound | None = None,
    progress_bar: bool = True,
) -> nn.Module:
    """Quantize a trained network after training: observe the ranges of its activations on calibration batches.

    There is no moving average, since the weights do not change: where the recipe has `MovingAverage` or `MinMax` a
    range holds all observed values, and what other observers find is averaged over the batches. Inside `fake_quantized`
    the network is quantized. Where too much accuracy is lost, three options change the weights to recover some, and
    ``QuantizationAwareTraining(recipe, start=0.0)`` continues from here. Without options the weights are as before.

    Args:
        model: trained; in any mode, on any device.
        example_inputs: what ``model`` is called with: a tensor, a tuple of positional arguments or a dict of keyword
            arguments; the calibration batch where there is no ``data``.
        recipe: how many bits, and for whose kernels.
        data: calibration batches; of a tuple or list the first item is the input, a dict holds keyword arguments.
            Some 256 training images are a good start, up to a thousand for ``rounding``.
        equalize: first, equalize the ranges of consecutive layers, channel by channel; the network computes the same
            function. Through batch norm, ReLU and leaky ReLU, not through ReLU6. For networks of depthwise
            convolutions, whose channels have very different ranges.
        correct_bias: correct the shift of every channel's mean that quantization causes, layer by layer, in the bias of
            the layer or of its batch norm.
        rounding: learn which weights to round up and which down, layer by layer: ``AdaRound()``. The weights become
            multiples of their scale.
        progress_bar: whether a terminal shows the progress of ``correct_bias`` and ``rounding``.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no calibration data, the model cannot be called with it, or values in the network are not
            finite; or no layer has a weight that can be quantized. ``model`` is then as it was, as after any other
            error.
        TypeError: an argument of the wrong type.

    Warns:
        NoEffectWarning: an option had nothing to do, or not for all layers, which are named.

    Example:
        >>> from lightning_light.quantization import Int8, fake_quantized, quantize
        >>> images = torch.randn(4, 3, 8, 8)
        >>> with fake_quantized(quantize(model, images, Int8(), equalize=True)):
        ...     logits = model(images)
    """
    inputs = calls_from("quantize", model, example_inputs, data)
    state: dict[str, Any] = {}
    examples = list(inputs) if correct_bias or rounding is not None else []  # for what changes the weights
    inputs = iter(examples or inputs)
    first = next(inputs)
    with isolated(model), _restored(model, equalize or bool(examples)):
        with explained("quantize", model, first):
            model(*first.args, **first.kwargs)
        if equalize and not equalize_layers(model, first):
            _warn("equalize=True", "no two layers in a row with nothing but batch norm, ReLU and pooling between them")
        original = copy_network(model) if examples else model
        plan = begin(state, model, first, recipe)
        quantizer = attach_fake_quantizer(model, state)
        if quantizer is None:
            raise ValueError(
                f"`quantize({type(model).__name__}, ..., {recipe!r})`: expected layers to quantize, found no "
                f"convolution or linear layer that can be; left in float: {plan.left_float or 'none'}. Give the part "
                "of the network that has some, or exclude fewer."
            )
        try:
            _observe(model, quantizer, state, chain([first], inputs))
            enable(state, quantizer)
            state["recipe"] = repr(recipe)
            if examples:
                refinement = Refinement(model, original, quantizer, examples, rounding, correct_bias, state["learned"])
                refinement.run(progress_bar=progress_bar)
                _warn_of_unchanged(refinement)
        finally:
            quantizer.remove()
    compression_state = attach(model)
    compression_state.state[METHOD] = state
    compression_state.claim(model, METHOD, Stage.QUANTIZATION, state["layers"])
    release(model)
    return model


def _observe(model: nn.Module, quantizer: FakeQuantizer, state: dict[str, Any], inputs: Iterable[ExampleInput]) -> None:
    widest = torch.tensor([isinstance(spec.observer, MinMax | MovingAverage) for spec in quantizer.activations]).bool()
    quantizer.observing = True
    for batch, call in enumerate(inputs):
        with explained("quantize", model, call):
            model(*call.args, **call.kwargs)
        seen = quantizer.observer.take(torch.device("cpu"))
        _check_finite(quantizer.plan, seen, batch)
        merge(state, quantizer, seen, torch.where(widest, torch.nan, 1 / (batch + 1)))
    quantizer.observing = False


@contextmanager
def _restored(model: nn.Module, changes: bool) -> Iterator[None]:
    """Restore the parameters if the block, which ``changes`` them, raises."""
    before = {parameter: parameter.detach().clone() for parameter in model.parameters() if changes}
    try:
        yield
    except BaseException:
        for parameter, value in before.items():
            parameter.data.copy_(value)
        raise


def _check_finite(plan: QuantizationPlan, seen: Tensor, batch: int) -> None:
    """What was not observed is (inf, -inf)."""
    bad = seen.isnan().any(1) | (seen[:, 0] == -torch.inf) | (seen[:, 1] == torch.inf)
    if bad.any():
        module = next(op.module for op, activation in plan.sites() if bad[activation])
        raise ValueError(
            f"`quantize(...)`: expected finite values, found others in batch {batch}, at "
            f"`{module or 'the network itself'}`. Look in the batch and in the weights: `torch.isfinite(x).all()`."
        )


def _warn_of_unchanged(refinement: Refinement) -> None:
    if nearest := list(dict.fromkeys(refinement.nearest)):
        _warn("rounding=AdaRound(...)", f"weights that are computed, used twice or not uniform: {nearest}")
    if uncorrected := list(dict.fromkeys(refinement.uncorrected)):
        _warn("correct_bias=True", f"no bias in {uncorrected}, nor in a batch norm after it")


def _warn(option: str, found: str) -> None:
    warnings.warn(f"`quantize(..., {option})` left layers as they were: {found}.", NoEffectWarning, stacklevel=3)
