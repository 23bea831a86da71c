"""The operations of a forward pass with the tensors that they were called with."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_light.example_input import ExampleInput, tensors_in
from lightning_light.quantization.operations import BATCH_NORM, HEAVY, kind_of, name_of
from lightning_light.quantization.places import Frames

__all__ = ["Call", "Parameters", "batch_norm_gain", "calls_of", "inputs_of"]

_LAYER = ("input", "weight", "bias")
_CONVOLUTION = (*_LAYER, "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_LAYER, "stride", "padding", "output_padding", "groups", "dilation")


@dataclass
class Call:
    """One operation as it was called.

    Attributes:
        name: what torch calls it.
        function: what was called.
        args: positional arguments.
        kwargs: keyword arguments.
        result: what it gave; later operations may have written into it.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None

    @property
    def named(self) -> dict[str, Any]:
        """The arguments of a layer or batch norm by name."""
        return {**dict(zip(_parameters(self.name), self.args, strict=False)), **self.kwargs}

    @property
    def channels(self) -> int:
        """The dimension of the result that counts output channels."""
        if kind_of(self.name) == "linear":
            return -1
        weight = self.named["weight"]
        return 1 if kind_of(self.name) == BATCH_NORM else int(self.result.dim() - weight.dim() + 1)

    def again(self, x: Tensor, **replaced: Any) -> Tensor:
        """The same operation on other numbers."""
        if kind_of(self.name) in HEAVY or kind_of(self.name) == BATCH_NORM:
            result: Tensor = self.function(**{**self.named, "input": x, **replaced})
        else:
            options = {name: value for name, value in self.kwargs.items() if name != "input"}
            result = self.function(x, *self.args[1:], **options)
        return result


def calls_of(model: nn.Module, example: ExampleInput) -> dict[str, Call]:
    """All operations of one forward pass by their names, as in `Frames`."""
    calls: dict[str, Call] = {}

    def note(key: str, call: Call) -> None:
        calls[key] = call

    with _Watch(model, note):
        model(*example.args, **example.kwargs)
    return calls


def inputs_of(model: nn.Module, key: str, examples: Iterable[ExampleInput]) -> list[Tensor]:
    """What the layer ``key`` reads in each forward pass: rounded, where numbers are rounded."""
    found: list[Tensor] = []

    def note(name: str, call: Call) -> None:
        if name == key:
            found.append(call.named["input"].detach().clone())  # a later operation may write into it
            raise _Enough

    with _Watch(model, note):
        for example in examples:
            with suppress(_Enough):
                model(*example.args, **example.kwargs)
    return found


class _Enough(Exception):  # noqa: N818  # ends a forward pass of which no more is wanted
    pass


class _Watch(TorchFunctionMode):
    """Tells of every operation, before it runs and again with its result."""

    def __init__(self, model: nn.Module, note: Callable[[str, Call], None]) -> None:
        super().__init__()
        self.frames, self.note = Frames(), note
        self.frames.watch(model)

    @override
    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)  # type: ignore[no-untyped-call]
        self.frames.let_go()

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = name_of(func)
        key = self.frames.next_key(name)
        if key is None:
            return func(*args, **(kwargs or {}))
        call = Call(name, func, tuple(args), dict(kwargs or {}))
        self.note(key, call)
        call.result = func(*args, **(kwargs or {}))
        return call.result


class Parameters:
    """Which parameter of ``model`` a tensor is, if it is one that can be written without changing anything else.

    That is so if one operation reads it, as it is: neither tied, nor computed from another tensor.
    """

    def __init__(self, model: nn.Module, calls: Mapping[str, Call]) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._uses = Counter(
            id(tensor)
            for call in calls.values()
            if any(True for _ in tensors_in([call.result]))
            for tensor in tensors_in([*call.args, call.kwargs])
            if id(tensor) in self._names
        )

    def name_of(self, tensor: Tensor | None) -> str | None:
        """Its name in ``named_parameters``; None if it should better not be written."""
        return self._names.get(id(tensor)) if self._uses[id(tensor)] == 1 else None


def batch_norm_gain(named: Mapping[str, Any]) -> Tensor:
    """``gamma / sqrt(var + eps)``, in float64: what a batch norm multiplies each channel by in evaluation."""
    gain: Tensor = (named["running_var"].double() + named.get("eps", 1e-5)).rsqrt()
    weight = named.get("weight")
    return gain if weight is None else gain * weight.detach().double()


def _parameters(name: str) -> tuple[str, ...]:
    if kind_of(name) == BATCH_NORM:
        return tuple(inspect.signature(F.batch_norm).parameters)
    return {"conv": _CONVOLUTION, "transposed": _TRANSPOSED}.get(kind_of(name), _LAYER)
