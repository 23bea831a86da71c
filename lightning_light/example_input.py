"""Example inputs: from the user's ``example_input_array``, else captured from the first training batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_light.errors import LightningLightError
from lightning_light.host.modules import compiled_methods, is_step_call, trainer_of
from lightning_light.nested import map_tensors, tensors_in

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["Capture", "ExampleInput", "capture"]

_SAMPLES = 2  # batch norm in training mode needs two


@dataclass(frozen=True, eq=False)
class ExampleInput:
    """Arguments and keyword arguments of one call of a module.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        step: whether they are those of ``training_step``, see `step_as_forward`, in place of ``forward``.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    step: bool = field(default=False, repr=False)

    @classmethod
    def of(cls, value: Any) -> ExampleInput:
        """Make an `ExampleInput` of what a user gives as example inputs, as Lightning reads ``example_input_array``.

        Args:
            value: a tensor or another single argument, a tuple of positional arguments, a dict of keyword arguments,
                or an `ExampleInput`.

        Raises:
            TypeError: ``value`` is None.

        Example:
            >>> x = torch.zeros(1, 3)
            >>> len(ExampleInput.of(x).args), len(ExampleInput.of((x, x)).args), list(ExampleInput.of({"x": x}).kwargs)
            (1, 2, ['x'])
        """
        if value is None:
            raise TypeError(
                "`example_inputs=None`: expected a tensor, a tuple of positional arguments, a dict of keyword "
                "arguments, or an `ExampleInput`. Give what `forward` is called with: `torch.randn(1, 3, 32, 32)`."
            )
        if isinstance(value, ExampleInput):
            return value
        if isinstance(value, tuple):
            return cls(value)
        return cls(kwargs=dict(value)) if isinstance(value, Mapping) else cls((value,))

    @property
    def samples(self) -> int:
        """Return the number of samples: the first dimension of the first tensor; 1 without tensors."""
        return next((len(tensor) for tensor in tensors_in((self.args, self.kwargs)) if tensor.ndim), 1)

    def small(self, samples: int | None = _SAMPLES) -> ExampleInput:
        """Return a detached copy with at most ``samples`` samples, if the first dimensions of all tensors agree.

        None for a copy of all samples.
        """
        sizes = {tensor.shape[0] if tensor.ndim else None for tensor in tensors_in((self.args, self.kwargs))}
        most = samples if len(sizes) == 1 and None not in sizes else None
        return ExampleInput(_copy(self.args, most), _copy(self.kwargs, most), self.step)

    def to(self, model: nn.Module) -> ExampleInput:
        """Return a copy on the device and in the floating-point type of ``model``."""
        reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        return ExampleInput(_move(self.args, reference), _move(self.kwargs, reference), self.step)


class Capture:
    """A hook that captures the example input of a module, and removes itself as soon as it has one.

    Attributes:
        example: the captured call; None until there is one.
    """

    def __init__(self) -> None:
        self.example: ExampleInput | None = None
        self._handle: RemovableHandle | None = None

    def remove(self) -> None:
        """Remove the hook. More than once does no harm."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_step_call(module) or not _is_training(module):
            return
        self.example = ExampleInput(args, kwargs).small()
        self.remove()


def capture(pl_module: nn.Module, module: nn.Module | None = None) -> Capture:
    """Capture the example input of ``module`` without drawing a batch from the user's loader.

    The module's ``example_input_array`` is used at once. Without one, a forward pre-hook captures the first call in
    training, where the batch has its final structure, device and type. Decisions about the structure must depend on
    the shapes alone, because a resumed run captures another batch.

    Args:
        pl_module: the LightningModule.
        module: the submodule whose call is captured, if not ``pl_module`` itself; ``example_input_array`` is then
            not used.

    Raises:
        LightningLightError: the steps of ``pl_module`` are compiled, and it has no ``example_input_array``.
    """
    found = Capture()
    array = getattr(pl_module, "example_input_array", None) if module in (None, pl_module) else None
    if array is not None:
        found.example = ExampleInput.of(array).small()
        return found
    if compiled_methods(pl_module):
        raise LightningLightError(
            f"`trainer.fit(torch.compile({type(pl_module).__name__}(...)))`: expected an example input, found "
            "compiled steps, in which no hook can capture one, and no `example_input_array`. Set it in the module, or "
            "compile the network in place: `module.compile()`."
        )
    found._handle = (module or pl_module).register_forward_pre_hook(found._capture, with_kwargs=True)
    return found


def _is_training(module: nn.Module) -> bool:
    trainer = trainer_of(module)
    return module.training if trainer is None else bool(trainer.training)


def _copy(value: Any, samples: int | None) -> Any:
    return map_tensors(lambda tensor: (tensor.detach()[:samples] if tensor.ndim else tensor.detach()).clone(), value)


def _move(value: Any, reference: Tensor) -> Any:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(reference) if tensor.is_floating_point() else tensor.to(reference.device)

    return map_tensors(move, value)
