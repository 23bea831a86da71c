"""Calls of a network: their batches, and their tensors by position, as runtimes take them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from lightning_light.errors import TraceError
from lightning_light.example_input import ExampleInput

__all__ = [
    "Positional",
    "batch_size",
    "batched",
    "cloned",
    "first_sample",
    "first_samples",
    "in_order",
    "samples",
    "sliced",
    "tripled",
]


def batch_size(call: ExampleInput) -> int | None:
    """Return the first dimension of the first tensor that has one; None if there is no such tensor."""
    shaped = (leaf for leaf in tree_leaves((call.args, call.kwargs)) if _is_batched(leaf))
    first = next(shaped, None)
    return None if first is None else len(first)


def first_sample(call: ExampleInput) -> ExampleInput:
    """Return the first sample, as a batch of one.

    Example:
        >>> call = first_sample(ExampleInput((torch.zeros(4, 3),), {"scale": torch.zeros(()), "flip": True}))
        >>> call.args[0].shape, call.kwargs
        (torch.Size([1, 3]), {'scale': tensor(0.), 'flip': True})
    """
    return first_samples(call, 1)


def first_samples(call: ExampleInput, limit: int | None) -> ExampleInput:
    """Return at most ``limit`` samples; all of them for None."""
    return call if limit is None else _batched(call, lambda tensor: tensor[:limit])


def samples(call: ExampleInput, limit: int) -> list[ExampleInput]:
    """Return the first samples, each as a batch of one."""
    count = min(batch_size(call) or 0, limit)
    return [_batched(call, lambda tensor, at=place: tensor[at : at + 1]) for place in range(count)]  # type: ignore[misc]


def sliced(call: ExampleInput, start: int, stop: int) -> ExampleInput:
    """Return the samples from ``start`` to before ``stop``."""
    return _batched(call, lambda tensor: tensor[start:stop])


def tripled(call: ExampleInput) -> ExampleInput:
    """Repeat the batch three times, to find a batch size that has become a constant."""
    return _batched(call, lambda tensor: torch.cat([tensor, tensor, tensor]))


def cloned(call: ExampleInput) -> ExampleInput:
    """Clone the tensors on the CPU, outside inference mode: a forward pass may write into its inputs."""
    with torch.inference_mode(False):
        return _mapped(call, lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf)


def batched(call: ExampleInput) -> ExampleInput:
    """Replace each tensor by whether its first dimension is the batch.

    Example:
        >>> batched(ExampleInput((torch.zeros(4, 3),), {"scale": torch.zeros(()), "flip": True}))
        ExampleInput(args=(True,), kwargs={'scale': False, 'flip': False})
    """
    size = batch_size(call)
    return _mapped(call, lambda leaf: _is_batched(leaf) and len(leaf) == size)


def in_order(value: Any) -> Any:
    """Sort nested dicts by their keys: the order in which a runtime takes and returns tensors.

    Example:
        >>> in_order([{"b": 1, "a": (2, 3)}])
        [{'a': [2, 3], 'b': 1}]
    """
    if isinstance(value, Mapping):
        return {key: in_order(value[key]) for key in sorted(value, key=str)}
    return [in_order(item) for item in value] if isinstance(value, list | tuple) else value


def _batched(call: ExampleInput, change: Callable[[Tensor], Tensor]) -> ExampleInput:
    """Change the tensors whose first dimension is the batch; others (a table, a scale) are not changed."""
    size = batch_size(call)
    return _mapped(call, lambda leaf: change(leaf) if _is_batched(leaf) and len(leaf) == size else leaf)


def _mapped(call: ExampleInput, change: Callable[[Any], Any]) -> ExampleInput:
    return ExampleInput(tree_map(change, call.args), tree_map(change, call.kwargs))


def _is_batched(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


class Positional(nn.Module):
    """A module whose forward takes the tensors of an example call by position; other arguments are constants.

    Runtimes take tensors by position, and no flags or None.

    Attributes:
        names: of the positional inputs.
        constants: arguments without tensors.
        batched: for each positional input, in its structure, whether the first dimension is a dynamic batch.

    Example:
        >>> class Scaled(nn.Module):
        ...     def forward(self, x, *, scale, flip=False):
        ...         return x.flip(0) * scale if flip else x * scale
        >>> call = ExampleInput((torch.ones(2),), {"flip": False, "scale": torch.ones(2)})
        >>> module = Positional(Scaled(), call)
        >>> module.names, module.constants
        (('x', 'scale'), {'flip': False})
        >>> module.batched
        (False, False)
        >>> module(torch.ones(2), torch.full((2,), 4.0))
        tensor([4., 4.])
    """

    def __init__(self, model: nn.Module, example: ExampleInput, batched: ExampleInput | None = None) -> None:
        super().__init__()
        self.model = model
        self._signature = inspect.signature(model.forward)
        named = self._named(example)
        self.names = tuple(name for name, value in named.items() if _has_tensor(value))
        self.constants = {name: value for name, value in named.items() if name not in self.names}
        self._order = list(named)
        self._keywords = list(self._bound(example).kwargs)
        self.batched = self.tensors(batched or _mapped(example, lambda leaf: False))

    @override
    def forward(self, *tensors: Any) -> Any:
        values = {**self.constants, **dict(zip(self.names, tensors, strict=True))}
        args = [values[name] for name in self._order if name not in self._keywords]
        return self.model(*args, **{name: values[name] for name in self._keywords})

    def fits(self, call: ExampleInput) -> bool:
        """Whether a call differs from the example in its tensors only."""
        named = self._named(call)
        constants = {name: value for name, value in named.items() if name not in self.names}
        return list(named) == self._order and all(map(_has_tensor, self._pick(named))) and constants == self.constants

    def tensors(self, call: ExampleInput) -> tuple[Any, ...]:
        """Return the positional inputs of a call that `fits`."""
        return self._pick(self._named(call))

    def _pick(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(named[name] for name in self.names)

    def _bound(self, call: ExampleInput) -> inspect.BoundArguments:
        try:
            return self._signature.bind(*call.args, **call.kwargs)
        except TypeError as error:
            raise TraceError(
                f"`{type(self.model).__name__}.forward{self._signature}`: expected an example that it can be called "
                f"with, found {len(call.args)} positional inputs and {list(call.kwargs)}: {error}. In an "
                "`example_input_array` a tuple holds the arguments and a dict the keyword arguments; a batch that is "
                "itself a dict goes into a tuple: `({...},)`."
            ) from error

    def _named(self, call: ExampleInput) -> dict[str, Any]:
        """Return all arguments by name, in the order of the signature."""
        bound = self._bound(call)
        names = [name for name, kind in self._signature.parameters.items() if kind.kind <= kind.POSITIONAL_OR_KEYWORD]
        names += [f"argument {place}" for place in range(len(names), len(bound.args))]
        in_order = {name: bound.kwargs[name] for name in self._signature.parameters if name in bound.kwargs}
        positional = dict(zip(names, bound.args, strict=False))
        return {**positional, **in_order, **bound.kwargs}


def _has_tensor(value: object) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
