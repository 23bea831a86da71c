"""What the network is called with: from the user's ``example_input_array``, else from the first real batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_light.errors import LightningLightError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["Capture", "ExampleInput", "capture"]

_SAMPLES = 2  # batch norm in training mode needs two


@dataclass(frozen=True, eq=False)
class ExampleInput:
    """Arguments and keyword arguments of one call of a module."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_array(cls, example: Any) -> ExampleInput:
        """What Lightning makes of an ``example_input_array``: a tuple is arguments, a dict is keyword arguments."""
        if isinstance(example, tuple):
            return cls(example)
        return cls(kwargs=dict(example)) if isinstance(example, Mapping) else cls((example,))

    @property
    def samples(self) -> int:
        """How many samples the call holds: the first dimension of its first tensor; 1 where there is none."""
        return next((len(tensor) for tensor in tensors_in((self.args, self.kwargs)) if tensor.ndim), 1)

    def small(self) -> ExampleInput:
        """A detached copy with at most two samples, if all tensors agree on which dimension counts samples."""
        sizes = {tensor.shape[0] if tensor.ndim else None for tensor in tensors_in((self.args, self.kwargs))}
        samples = _SAMPLES if len(sizes) == 1 and None not in sizes else None
        return ExampleInput(_copy(self.args, samples), _copy(self.kwargs, samples))

    def to(self, model: nn.Module) -> ExampleInput:
        """A copy on ``model``'s device, in its floating point type."""
        reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        return ExampleInput(_move(self.args, reference), _move(self.kwargs, reference))


class Capture:
    """The handle that `capture` returns; it has let go of the module as soon as it has an example.

    Attributes:
        example: what was caught, or None as long as nothing was.
    """

    def __init__(self) -> None:
        self.example: ExampleInput | None = None
        self._handle: RemovableHandle | None = None

    def remove(self) -> None:
        """Let go of the module; more than once does no harm."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_redirected(module) or not _is_training(module):
            return
        self.example = ExampleInput(args, kwargs).small()
        self.remove()


def capture(pl_module: nn.Module, module: nn.Module | None = None) -> Capture:
    """Find out how ``module`` is called, without drawing a batch from the user's loader.

    The module's ``example_input_array`` is taken at once. Without one, a forward pre-hook looks at the first call in
    training: whatever the batch is made of, it has the right structure, device and type by then. A structure decision
    must go by the example's shapes only: a resumed run sees another batch.

    Args:
        pl_module: the LightningModule.
        module: the part of it whose call is wanted, if not its own; its ``example_input_array`` is then of no use.

    Raises:
        LightningLightError: the steps of ``pl_module`` are compiled, and it has no ``example_input_array``.
    """
    found = Capture()
    array = getattr(pl_module, "example_input_array", None) if module in (None, pl_module) else None
    if array is not None:
        found.example = ExampleInput.from_array(array).small()
        return found
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        raise LightningLightError(
            f"`trainer.fit(torch.compile({type(pl_module).__name__}(...)))`: expected to see what the network is "
            "called with, found steps that are compiled, where no hook can look, and no `example_input_array`. Set "
            "that in the module, or compile the network in place: `module.compile()`."
        )
    found._handle = (module or pl_module).register_forward_pre_hook(found._look, with_kwargs=True)
    return found


def _is_redirected(module: nn.Module) -> bool:
    """Whether the call is ``training_step`` in disguise: DDP is given the batch through a patched ``forward``."""
    return getattr(vars(module).get("forward"), "__qualname__", "").startswith("_ForwardRedirection")


def _is_training(module: nn.Module) -> bool:
    trainer = getattr(module, "_trainer", None)
    return module.training if trainer is None else bool(trainer.training)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _map(value: Any, function: Any) -> Any:
    """``function`` on every tensor in dicts, lists, tuples and named tuples; what else there is stays itself."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [_map(item, function) for item in value]
    if isinstance(value, tuple):
        items = [_map(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _copy(value: Any, samples: int | None) -> Any:
    return _map(value, lambda tensor: tensor.detach()[:samples].clone() if tensor.ndim else tensor.detach().clone())


def _move(value: Any, reference: Tensor) -> Any:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(reference) if tensor.is_floating_point() else tensor.to(reference.device)

    return _map(value, move)
