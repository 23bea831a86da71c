"""Example inputs: the arguments of one call of a module."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_light.nested import map_tensors, tensors_in

__all__ = ["ExampleInput", "example_of_batch", "examples_of_data"]

_SAMPLES = 2  # batch norm in training mode needs two


@dataclass(frozen=True, eq=False)
class ExampleInput:
    """Arguments and keyword arguments of one call of a module.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        method: what is called: ``"forward"``, or a step of a LightningModule, see `callable_with`.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    method: str = field(default="forward", repr=False)

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
        return next((len(tensor) for tensor in tensors_in((self.args, self.kwargs), objects=True) if tensor.ndim), 1)

    @property
    def has_objects(self) -> bool:
        """Whether there are objects other than tensors and plain values, in which a call may write."""
        leaves = tree_leaves((self.args, self.kwargs))
        return not all(leaf is None or isinstance(leaf, Tensor | bool | int | float | str) for leaf in leaves)

    def small(self, samples: int | None = _SAMPLES) -> ExampleInput:
        """Return a detached copy with at most ``samples`` samples, if the first dimensions of all tensors agree.

        None for a copy of all samples.
        """
        found = tensors_in((self.args, self.kwargs), objects=True)
        sizes = {tensor.shape[0] if tensor.ndim else None for tensor in found}
        most = samples if len(sizes) == 1 and None not in sizes else None
        return replace(self, args=_copy(self.args, most), kwargs=_copy(self.kwargs, most))

    def to(self, model: nn.Module) -> ExampleInput:
        """Return a copy on the device and in the floating-point type of ``model``."""
        reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        return replace(self, args=_move(self.args, reference), kwargs=_move(self.kwargs, reference))

    def copied(self) -> ExampleInput:
        """Return a copy that a call may change, also the objects in it, where they can be copied."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            try:
                return copy.deepcopy(self)
            except (RuntimeError, TypeError):  # a tensor with a history, or an object that cannot be copied
                return replace(self, args=_copy(self.args, None), kwargs=_copy(self.kwargs, None))


def example_of_batch(batch: Any, model: nn.Module) -> ExampleInput:
    """Return the call of ``model`` for a batch: a mapping is keyword arguments; of a tuple or list the first item."""
    if isinstance(batch, ExampleInput):
        return batch.to(model)
    if isinstance(batch, Mapping):
        return ExampleInput(kwargs=dict(batch)).to(model)
    return ExampleInput((batch[0] if isinstance(batch, (list, tuple)) else batch,)).to(model)


def examples_of_data(
    data: Iterable[Any] | None, model: nn.Module, example: ExampleInput, count: int
) -> list[ExampleInput]:
    """Return the calls of ``model`` for the first ``count`` batches; ``example`` without data.

    Raises:
        ValueError: there is no batch.
    """
    calls = [example] if data is None else [example_of_batch(batch, model) for batch in islice(data, count)]
    if not calls:
        raise ValueError(
            f"`{type(model).__name__}` with `data=...`: expected at least one batch, found none. An iterator that has "
            "been used up is empty: give a list or a DataLoader."
        )
    return calls


def _copy(value: Any, samples: int | None) -> Any:
    return map_tensors(lambda tensor: (tensor.detach()[:samples] if tensor.ndim else tensor.detach()).clone(), value)


def _move(value: Any, reference: Tensor) -> Any:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(reference) if tensor.is_floating_point() else tensor.to(reference.device)

    return map_tensors(move, value)
