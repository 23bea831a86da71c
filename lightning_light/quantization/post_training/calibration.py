"""Calibration data: inputs of the network, without labels."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.int8 import quantizers_of
from lightning_light.nested import tensors_in

__all__ = ["calls_from", "check_calibration", "explained", "first_of"]

_CURE = "Give a list of tensors, for instance `[images for images, _ in loader]`."


def check_calibration(function: str, model: nn.Module, calibration: Iterable[Any]) -> None:
    """Refuse one batch in place of several, and a network that is fake-quantized already.

    Raises:
        TypeError: the former.
        UnsupportedError: the latter.
    """
    if isinstance(calibration, Tensor | dict):
        raise TypeError(
            f"`{function}({type(model).__name__}, calibration, ...)`: expected an iterable of batches, found "
            f"{type(calibration).__name__}. {_CURE}"
        )
    if any(quantizer.enabled for quantizer in quantizers_of(model)):
        raise UnsupportedError(
            f"`{function}({type(model).__name__}, ...)`: expected a float network, found one that is fake-quantized. "
            "Leave `fake_quantized` first, and a Trainer with `QuantizationAwareTraining`."
        )


def calls_from(function: str, model: nn.Module, calibration: Iterable[Any]) -> Iterator[ExampleInput]:
    """How ``model`` is called with each batch.

    Raises:
        ValueError: a batch is a list, as a loader of images and labels gives it, has no tensor or no sample, or does
            not fit the arguments of ``forward``.
    """
    for batch in calibration:
        if isinstance(batch, list):
            raise ValueError(
                f"`{function}(..., calibration)`: expected what the model is called with (a tensor, a tuple, a dict), "
                "found a list, as a loader of images and labels gives it. Write `(images for images, _ in loader)`."
            )
        call = ExampleInput.of(batch).to(model)
        if not any(True for _ in tensors_in((call.args, call.kwargs))):
            raise ValueError(
                f"`{function}(..., calibration)`: expected batches of tensors, found {type(batch).__name__}. {_CURE}"
            )
        if not call.samples:
            raise ValueError(
                f"`{function}(..., calibration)`: expected a sample in each batch, found {_described(call)}. "
                "Leave empty batches out."
            )
        _check_arguments(function, model, call)
        yield call


def first_of(function: str, model: nn.Module, calls: Iterator[ExampleInput]) -> ExampleInput:
    """The first call.

    Raises:
        ValueError: there is none.
    """
    first = next(calls, None)
    if first is None:
        raise ValueError(
            f"`{function}({type(model).__name__}, calibration, ...)`: expected inputs to calibrate on, found no batch; "
            f"a generator gives its batches only once. {_CURE}"
        )
    return first


@contextmanager
def explained(function: str, model: nn.Module, call: ExampleInput) -> Iterator[None]:
    """Say which batch it was that ``model`` could not be called with.

    Raises:
        ValueError: it could not.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"`{function}({type(model).__name__}, calibration, ...)`: expected batches that the model runs with, found "
            f"that {_described(call)} stops it: {type(error).__name__}: {lines[0].rstrip('.')}. Check that "
            "`model(*batch)` runs for a tuple, `model(**batch)` for a dict, and `model(batch)` for a tensor."
        ) from error


def _check_arguments(function: str, model: nn.Module, call: ExampleInput) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise ValueError(
            f"`{function}(..., calibration)`: expected what `{type(model).__name__}.forward{signature}` takes, "
            f"found {_described(call)}: {error}. A tuple holds arguments and a dict keyword arguments; labels are not "
            "wanted: `(images for images, _ in loader)`."
        ) from error


def _described(call: ExampleInput) -> str:
    tensors = list(tensors_in((call.args, call.kwargs)))
    names = f" as {', '.join(call.kwargs)}" if call.kwargs else ""
    return f"a batch of {', '.join(f'{tuple(one.shape)} {one.dtype}' for one in tensors)}{names}"
