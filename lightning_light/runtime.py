"""Base class of runtimes in which a network can be timed; exporters are runtimes."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from lightning_light.example_input import ExampleInput

__all__ = ["Runtime"]


class Runtime(ABC):
    """Time networks as they run on a device; a frozen dataclass.

    For a device of your own, such as a phone, write one subclass: ``seconds`` sends the file there, and returns what
    was measured.
    """

    @abstractmethod
    def check(self) -> None:
        """Check, before anything is trained, that the runtime is installed.

        Raises:
            UnsupportedError: names the missing package.
        """

    @abstractmethod
    def runtime(self) -> str:
        """Name the runtime, with its version."""

    @abstractmethod
    def seconds(self, model: nn.Module, example: ExampleInput, threads: int) -> float:
        """Write ``model`` to a temporary file, run it on one sample, and return the median of several calls in seconds.

        Args:
            model: in any mode, on any device; left as found.
            example: a call of its ``forward``.
            threads: number of threads of the runtime.

        Raises:
            TraceError: the file format cannot express the model.
            UnsupportedError: the runtime is not installed.
        """
