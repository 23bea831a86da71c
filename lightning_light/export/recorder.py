"""Record the inputs of ``forward`` during validation, by a hook: no loader is iterated, no random number drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_light.example_input import ExampleInput
from lightning_light.export.inputs import cloned
from lightning_light.host.modules import is_step_call
from lightning_light.host.patches import RunHook

__all__ = ["Recorder"]


class Recorder:
    """Keeps copies of the first ``limit`` inputs of a module's ``forward``.

    Example:
        >>> recorder = Recorder(limit=2)
        >>> recorder.start(model)
        >>> outputs = [model(torch.full((1, 3, 8, 8), float(value))) for value in range(3)]
        >>> recorder.stop()
        >>> [float(call.args[0].mean()) for call in recorder.calls]
        [0.0, 1.0]
    """

    def __init__(self, *, limit: int) -> None:
        self.calls: list[ExampleInput] = []
        self._limit = limit
        self._recording: list[ExampleInput] = []
        self._handle: RemovableHandle | None = None

    def start(self, module: nn.Module) -> None:
        """Start a new recording; until `stop`, ``calls`` has the inputs of the last one."""
        self.stop()
        self._recording = []
        self._handle = module.register_forward_pre_hook(RunHook(self._record), with_kwargs=True, prepend=True)

    def stop(self) -> None:
        """Remove the hook; without new inputs those of the last recording are kept."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.calls, self._recording = self._recording or self.calls, []

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling() or is_step_call(module) or len(self._recording) >= self._limit:
            return
        self._recording.append(cloned(ExampleInput(args, dict(kwargs))))
