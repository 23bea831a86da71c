"""Base class of runtimes in which a network can be timed; exporters are runtimes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from lightning_light.example_input import ExampleInput

__all__ = ["Runtime"]


class Runtime(ABC):
    """Runs networks as they run on a device, from a file."""

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
    def loaded(
        self, model: nn.Module, example: ExampleInput, threads: int
    ) -> AbstractContextManager[Callable[[], object]]:
        """Write ``model`` to a temporary file, and load it; yield a function that runs it on one sample.

        Args:
            model: in any mode, on any device; left as found.
            example: a call of its ``forward``.
            threads: number of threads of the runtime.

        Raises:
            TraceError: the file format cannot express the model.
            UnsupportedError: the runtime is not installed.
        """
