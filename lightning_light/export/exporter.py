"""What a file format has to offer: write a file, and run it in the runtime that will run it on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from lightning_light.export.inputs import Positional
from lightning_light.int8 import Int8Weights

__all__ = ["Exporter"]


class Exporter(ABC):
    """One file format and its runtime. A frozen value: everything it needs to know is in its fields.

    A new format is one file with one subclass; comparison, measures and the report are not its business.
    """

    suffix: ClassVar[str]
    """What a path of this format ends in: ``.ptl``."""

    @property
    def largest_batch(self) -> int | None:
        """The largest batch that its files run with, if they are exported for ``batch='any'``; None: there is none."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Refuse, before anything is trained, if the format or its runtime is not installed.

        Raises:
            UnsupportedError: names what is missing and what takes its place.
        """

    def check_int8(self, weights: Int8Weights | None) -> None:  # noqa: B027  # most formats take what comes
        """Refuse, before anything is trained, weights that the format cannot hold.

        Args:
            weights: how they will be quantized; None: nothing in the Trainer quantizes them.

        Raises:
            UnsupportedError: says what fits.
        """

    @abstractmethod
    def runtime(self) -> str:
        """The runtime that `load` uses and its version; times hold for it alone."""

    @abstractmethod
    def write(self, model: Positional, tensors: tuple[Any, ...], path: Path) -> dict[str, Any]:
        """Write ``model`` to ``path``.

        Args:
            model: a copy on the CPU in evaluation mode that this call may change; ``model.batched`` tells in which
                tensors the first dimension has to stay open.
            tensors: an example call of ``model``, one sample.
            path: where to; the folder exists.

        Returns:
            Details for the report, in plain types. Of an int8 file, ``output_scales`` has the scale of each output, 0.0
            for a float output: differences are counted in them.

        Raises:
            TraceError: the format cannot express the model.
        """

    @abstractmethod
    def load(self, path: Path) -> Callable[..., Any]:
        """The written file, run by its runtime: positional tensors in, the model's outputs out.

        Outputs may come as a flat list, dicts in the order of their keys. The runtime uses as many threads as torch.
        """
