"""Calibration data: inputs of the network, without labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_light.example_input import ExampleInput

__all__ = ["calls_from", "call_of"]


def call_of(function: str, model: nn.Module, batch: Any) -> ExampleInput:
    """How ``model`` is called with ``batch``.

    Raises:
        ValueError: ``batch`` is a list, as a loader of images and labels gives it.
    """
    if isinstance(batch, list):
        raise ValueError(
            f"`{function}(..., calibration)`: expected what the model is called with (a tensor, a tuple, a dict), "
            "found a list, as a loader of images and labels gives it. Write `(images for images, _ in loader)`."
        )
    return ExampleInput.from_array(batch).to(model)


def calls_from(function: str, model: nn.Module, calibration: Iterable[Any]) -> list[ExampleInput]:
    """All of it.

    Raises:
        ValueError: there is none.
    """
    found = [call_of(function, model, batch) for batch in calibration]
    if not found:
        raise ValueError(
            f"`{function}({type(model).__name__}, calibration)`: expected inputs to calibrate on, found no batch. Give "
            "a list of tensors, for instance `[images for images, _ in loader]`."
        )
    return found
