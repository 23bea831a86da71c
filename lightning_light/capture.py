"""Capture example inputs: from the user's ``example_input_array``, else from the first training batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_light.errors import LightningLightError
from lightning_light.example_input import ExampleInput
from lightning_light.host.modules import is_step_call, trainer_of
from lightning_light.host.patches import InstancePatch, RunHook, wrap_method
from lightning_light.isolation import FORWARD_ERRORS, isolated
from lightning_light.training_step import TRAINING_STEP, overrides, step_as_forward, step_call

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["Capture", "Observation", "capture", "has_lazy_layers"]


class Capture:
    """Captures the example input of a module in the first training step.

    Attributes:
        example: of ``forward``, or of ``training_step`` where that does not show one; None until it is known.
        observed: what an isolated run of the training step has shown; None where that was not needed.
    """

    def __init__(self) -> None:
        self.example: ExampleInput | None = None
        self.observed: Observation | None = None
        self._part = ""
        self._handle: RemovableHandle | None = None
        self._patch: InstancePatch | None = None

    def observe(self, module: nn.Module, batch: Any) -> Observation:
        """Run the training step on the first ``batch`` in isolation, and take the example input from what it calls."""
        self.observed = observe(module, batch, self._part)
        self.example = self.example or self.observed.example
        self.remove()
        return self.observed

    def calls(self, module: nn.Module, batch: Any) -> list[ExampleInput]:
        """Observe the first batch; return the calls whose channels are followed: of ``forward`` and of the steps.

        The validation step is one of them if it runs parts beside ``forward``. Without the training step, which is
        last, where that does not run in isolation.
        """
        step = self.observe(module, batch).step
        calls = [self.example] if self.example is not None and self.example.method == "forward" else []
        if step is None:
            return calls
        validation = overrides(module, "validation_step") and step_call(module, batch, "validation_step")
        if validation and (call := runs_beside_forward(module, validation)):
            calls.append(call)
        return [*calls, step]

    def require(self, call: str) -> None:
        """Refuse a run whose first training step has shown no example input.

        Raises:
            LightningLightError: names ``call``, the method that needs one.
        """
        if self.example is None and self.observed is not None:
            raise LightningLightError(
                f"`{call}`: expected an example of the inputs of `forward`, found no `example_input_array`, and none "
                f"in the first training step: {self.observed.error}. Set `self.example_input_array = ...` in the "
                "module."
            )

    def remove(self) -> None:
        """Remove the hooks. More than once does no harm."""
        if self._handle is not None:
            self._handle.remove()
        if self._patch is not None:
            self._patch.undo()
        self._handle = self._patch = None

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_step_call(module) or torch.compiler.is_compiling() or not _is_training(module):
            return
        self.example = ExampleInput(args, kwargs).small().copied()
        self.remove()

    def _around_step(self, module: nn.Module, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the training step; where it has not called what is captured, look for it in isolation."""
        call = ExampleInput((batch,)).copied()  # the step may change its batch
        out = step(batch, *args, **kwargs)
        if self.example is None:
            self.observe(module, *call.args)
        return out


def capture(pl_module: nn.Module, module: nn.Module | None = None) -> Capture:
    """Capture the example input of ``module`` without drawing a batch from the user's loader.

    The module's ``example_input_array`` is used at once. Without one, hooks capture the first call in training, where
    the batch has its final structure, device and type; and where the training step does not call ``self(...)``, what
    `observe` finds. Decisions about the structure must depend on the shapes alone, because a resumed run captures
    another batch.

    Args:
        pl_module: the LightningModule.
        module: the submodule whose call is captured, if not ``pl_module`` itself; ``example_input_array`` is then
            not used.
    """
    found = Capture()
    array = getattr(pl_module, "example_input_array", None) if module in (None, pl_module) else None
    if array is not None:
        found.example = ExampleInput.of(array).small()
        return found
    found._handle = (module or pl_module).register_forward_pre_hook(RunHook(found._capture), with_kwargs=True)
    found._part = next((name for name, inner in pl_module.named_modules() if inner is module), "")
    if hasattr(pl_module, TRAINING_STEP):
        found._patch = wrap_method(pl_module, TRAINING_STEP, functools.partial(found._around_step, pl_module))
    return found


class Observation:
    """What an isolated run of the training step on the first batch has shown.

    Attributes:
        step: the call of ``training_step``, with few samples where it runs on them; None where it does not run.
        error: why the step does not run, or why there is no example; empty otherwise.
        example: of ``forward``, as the step calls it or, where it does not, as it runs on what the parts of the module
            get; of the step where ``forward`` is not implemented or does not run on that.
        only_forward: whether the step called ``forward``, and no part with parameters beside it.
        called: names of the parts with parameters that the step called itself; ``""`` for ``forward``.
    """

    def __init__(self) -> None:
        self.step: ExampleInput | None = None
        self.error = ""
        self.example: ExampleInput | None = None
        self.only_forward = False
        self.called: list[str] = []


def observe(module: nn.Module, batch: Any, part: str = "") -> Observation:
    """Run the training step of ``module`` on ``batch`` in isolation.

    Args:
        module: a LightningModule; it is left exactly as it was.
        batch: as the step gets it.
        part: name of the submodule whose call is the example, in place of the module's own.
    """
    found = Observation()
    call = step_call(module, batch)
    if call is None:
        found.error = "`training_step(dataloader_iter)` draws its batches itself"
        return found
    calls, found.step, found.error = _run_smallest(module, call)
    found.only_forward = "" in calls.outermost and not calls.beside_forward
    found.called = [name for name in calls.outermost if not name or calls.has_parameters(name)]
    found.example = calls.first.get(part)
    if found.example is None and not part and found.step is not None:
        own = _accepted(module, calls, batch) if overrides(module, "forward") else None
        found.example = own or found.step
    if found.example is None:
        found.error = found.error or f"it does not call `{part}`"
    return found


def runs_beside_forward(module: nn.Module, call: ExampleInput) -> ExampleInput | None:
    """Return ``call``, of a step, if it runs in isolation and calls parts with parameters outside of ``forward``."""
    calls, step, _ = _run_smallest(module, call)
    return step if calls.beside_forward else None


def has_lazy_layers(module: nn.Module) -> bool:
    """Check whether a parameter has no shape before the first forward pass."""
    return any(is_lazy(parameter) for parameter in module.parameters())


class _Calls:
    """The calls of a module's parts in one run.

    Attributes:
        first: module name -> its first call.
        outermost: names of those called outside of every other.
    """

    def __init__(self, module: nn.Module) -> None:
        self.first: dict[str, ExampleInput] = {}
        self.outermost: list[str] = []
        self._module = module
        self._depth = 0

    def has_parameters(self, name: str) -> bool:
        """Check whether the part ``name`` has parameters."""
        return any(True for _ in self._module.get_submodule(name).parameters())

    @property
    def beside_forward(self) -> list[ExampleInput]:
        """The first calls of the parts with parameters that were called outside of ``forward``."""
        return [self.first[name] for name in self.outermost if name and self.has_parameters(name)]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record every ``forward``, also where that is called by name."""
        patches = [
            wrap_method(inner, "forward", functools.partial(self._record, name))
            for name, inner in self._module.named_modules()
            if not isinstance(inner, torch.jit.ScriptModule)
        ]
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.undo()

    def _record(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name not in self.first:
            self.first[name] = ExampleInput(args, kwargs).small().copied()
        if not self._depth and name not in self.outermost:
            self.outermost.append(name)
        self._depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self._depth -= 1


def _run_smallest(module: nn.Module, call: ExampleInput) -> tuple[_Calls, ExampleInput | None, str]:
    """Run ``call`` with few samples, and with all where that fails; return the call that ran, or None and the error."""
    error = ""
    for attempt in (call.small(), call):
        calls = _Calls(module)
        try:
            with calls.recording(), step_as_forward(module, [attempt]), isolated(module, hooks=True):
                module()
        except FORWARD_ERRORS as raised:
            error = error or f"{type(raised).__name__}: {raised}"
        else:
            return calls, attempt, ""
    return calls, None, error


def _accepted(module: nn.Module, step: _Calls, batch: Any) -> ExampleInput | None:
    """Return the first call on which ``forward`` runs, and runs parts that the training step runs."""
    for call in _candidates(module, step, batch):
        calls, copied = _Calls(module), call.copied()
        try:
            with calls.recording(), isolated(module, hooks=True):
                module(*copied.args, **copied.kwargs)
        except FORWARD_ERRORS:
            continue
        if any(name and calls.has_parameters(name) for name in calls.first.keys() & step.first.keys()):
            return call
    return None


def _candidates(module: nn.Module, step: _Calls, batch: Any) -> Iterator[ExampleInput]:
    """Yield what ``forward`` may take: what the step's own calls get, or the first parts of the batch."""
    yield from step.beside_forward
    parameters = inspect.signature(module.forward).parameters
    if isinstance(batch, Mapping):
        yield ExampleInput(kwargs={key: batch[key] for key in parameters if key in batch}).small()
    elif isinstance(batch, list | tuple):
        required = sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
        yield ExampleInput(tuple(batch[:required])).small()
    yield ExampleInput((batch,)).small()


def _is_training(module: nn.Module) -> bool:
    trainer = trainer_of(module)
    return module.training if trainer is None else bool(trainer.training)
