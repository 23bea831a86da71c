"""Attribute a tracer's warnings to the user's code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.overrides

from lightning_light.int8 import QUANTIZED_TENSORS_ARE_DEPRECATED

__all__ = ["attributed_to_caller"]

_BETWEEN = (
    str(Path(__file__).parent),
    torch.overrides.__file__,
    str(Path(warnings.__file__).with_name("contextlib.py")),
)


@contextmanager
def attributed_to_caller() -> Iterator[None]:
    """Let warnings that would name a line of this package name the line that called the operator instead."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", QUANTIZED_TENSORS_ARE_DEPRECATED)
        yield
    for warning in caught:
        ours = warning.filename.startswith(_BETWEEN)
        place = (frame.f_code.co_filename, frame.f_lineno) if ours else (warning.filename, warning.lineno)
        warnings.warn_explicit(warning.message, warning.category, *place)
