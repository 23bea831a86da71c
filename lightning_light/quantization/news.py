"""Warnings: torch's news that int8 kernels are deprecated, and those that a tracer has for the user's code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.overrides

from lightning_light.int8 import QUANTIZED_TENSORS_ARE_DEPRECATED

__all__ = ["warnings_of_the_caller", "without_news"]

_OURS = str(Path(__file__).parent)
_BETWEEN = (_OURS, torch.overrides.__file__, str(Path(warnings.__file__).with_name("contextlib.py")))


@contextmanager
def without_news() -> Iterator[None]:
    """Silence that one deprecation, and nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", QUANTIZED_TENSORS_ARE_DEPRECATED)
        yield


@contextmanager
def warnings_of_the_caller() -> Iterator[None]:
    """Warnings that name a line of this wing name the line that called the operation instead."""
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
