"""Calibration data of functions without a Trainer: inputs of the network, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

from torch import nn

from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput, example_of_batch
from lightning_light.int8 import quantizers_of
from lightning_light.nested import tensors_in

__all__ = ["calls_from", "explained", "finite_outputs"]

_CURE = "Pass `data`, batches for calibration, for instance `data=val_dataloader`."


def calls_from(
    function: str, model: nn.Module, example_inputs: Any, data: Iterable[Any] | None, *, limit: int | None = None
) -> Iterator[ExampleInput]:
    """Yield the calls of ``model`` that it is calibrated on: those of ``data``, or the one with ``example_inputs``.

    Args:
        function: that the user has called.
        model: the network.
        example_inputs: as in `ExampleInput.of`.
        data: batches, as in `example_of_batch`.
        limit: how many of them, at most.

    Raises:
        UnsupportedError: the network is fake-quantized already.
        ValueError: there is no batch, or one has no tensor or no sample.
    """
    if any(quantizer.enabled for quantizer in quantizers_of(model)):
        raise UnsupportedError(
            f"`{function}({type(model).__name__}, ...)`: expected a float network, found one that is fake-quantized. "
            "Leave `fake_quantized` first, and a Trainer with `QuantizationAwareTraining`."
        )
    if data is None and example_inputs is not None:
        return iter([_checked(function, ExampleInput.of(example_inputs).to(model))])
    calls = (_checked(function, example_of_batch(batch, model)) for batch in islice(data or (), limit))
    first = next(calls, None)
    if first is None:
        raise ValueError(
            f"`{function}({type(model).__name__}, ...)`: expected inputs to calibrate on, found no batch; "
            f"a generator gives its batches only once. {_CURE}"
        )
    return chain([first], calls)


def finite_outputs(subject: str, model: nn.Module, calls: Iterable[ExampleInput]) -> list[Any]:
    """Return the outputs of ``model`` for each of ``calls``, which those of a changed network are compared with.

    Args:
        subject: of the error: what the user has called, or the network.
        model: the network.
        calls: of it.

    Raises:
        ValueError: a tensor in the outputs is not finite.
    """
    found = []
    for batch, call in enumerate(calls):
        found.append(model(*call.args, **call.kwargs))
        if not all(bool(tensor.isfinite().all()) for tensor in tensors_in(found[-1])):
            raise ValueError(
                f"{subject}: expected finite outputs, found infinite ones or NaN for batch {batch}. Look for them in "
                "the batch and in the weights: `torch.isfinite(x).all()`."
            )
    return found


def _checked(function: str, call: ExampleInput) -> ExampleInput:
    if not any(True for _ in tensors_in((call.args, call.kwargs))):
        kinds = [type(value).__name__ for value in (*call.args, *call.kwargs.values())]
        raise ValueError(f"`{function}(...)`: expected batches of tensors, found {', '.join(kinds)}. {_CURE}")
    if not call.samples:
        raise ValueError(
            f"`{function}(...)`: expected a sample in each batch, found {_described(call)}. Leave empty batches out."
        )
    return call


@contextmanager
def explained(function: str, model: nn.Module, call: ExampleInput) -> Iterator[None]:
    """Name the batch that ``model`` could not be called with.

    Raises:
        ValueError: it could not.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"`{function}({type(model).__name__}, ...)`: expected batches that the model runs with, found "
            f"that {_described(call)} stops it: {type(error).__name__}: {lines[0].rstrip('.')}. Of a tuple or list "
            "the first item is the input; a dict holds keyword arguments; for several positional arguments give an "
            "`ExampleInput`."
        ) from error


def _described(call: ExampleInput) -> str:
    tensors = list(tensors_in((call.args, call.kwargs)))
    names = f" as {', '.join(call.kwargs)}" if call.kwargs else ""
    return f"a batch of {', '.join(f'{tuple(one.shape)} {one.dtype}' for one in tensors)}{names}"
