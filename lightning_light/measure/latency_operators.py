"""Find the convolutions and matrix products of a network, by which its latency in a runtime is estimated."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated, unfused_kernels
from lightning_light.nested import tensors_in

__all__ = ["COPIES", "Operator", "OperatorCalls", "operator_calls", "repeated"]

COPIES = 4

_aten = torch.ops.aten
_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Operator:
    """A convolution or matrix product on one sample.

    One with a weight is fused with what follows it.

    Attributes:
        input: shape.
        weight: shape; of a matrix product ``(outputs, inputs)``; of a batched one, the shape of the second factor.
        options: of a convolution: stride, padding, dilation, output padding, groups, and whether it is transposed.
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    options: tuple[Any, ...] = ()

    @property
    def key(self) -> str:
        """Name of the operator in a table."""
        shapes = "x".join(map(str, self.input)), "x".join(map(str, self.weight))
        return " ".join((self._kind, *shapes, *map(str, self.options)))

    @property
    def _kind(self) -> str:
        return "conv" if self.options else "linear" if len(self.weight) == 2 else "product"

    def copies(self) -> tuple[nn.Module, ExampleInput]:
        """Build a module that applies the operator `COPIES` times, and a call of it.

        Additions and activations follow, as in residual blocks; the changes of layout at the ends count once.
        """
        if self._kind == "product":
            factors = (torch.full((1, *shape), 0.5) for shape in (self.input, self.weight))  # one sample of all heads
            return _Products(), ExampleInput(tuple(factors))
        layers = [self._layer() for _ in range(COPIES)]
        for place, layer in enumerate(layers):
            for parameter in layer.to_empty(device="cpu").parameters():
                nn.init.constant_(parameter, 0.01 * (place + 1))  # unequal, so that none is computed once for all
        return _Repeated(layers), ExampleInput((torch.full(self.input, 0.5),))

    def _layer(self) -> nn.Module:
        if not self.options:
            return nn.Linear(self.weight[1], self.weight[0], device="meta")
        stride, padding, dilation, output_padding, groups, transposed = self.options
        sizes: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        channels, kernel = (self.weight[0], self.weight[1] * groups), tuple(self.weight[2:])
        kind = (_TRANSPOSED if transposed else _CONVOLUTIONS)[len(kernel) - 1]
        sizes |= {"output_padding": output_padding} if transposed else {}
        inputs, outputs = channels if transposed else reversed(channels)
        layer: nn.Module = kind(inputs, outputs, kernel, device="meta", **sizes)
        return layer


def repeated(module: nn.Module) -> nn.Module:
    """Build a module that applies `COPIES` copies of ``module``, whose weights differ, as `Operator.copies` does."""
    copies = [copy.deepcopy(module) for _ in range(COPIES)]
    for place, each in enumerate(copies):
        for parameter in each.parameters():
            parameter.data += 0.01 * place
    return _Repeated(copies)


@dataclass
class OperatorCalls:
    """What one forward pass computes.

    Attributes:
        operators: how often each runs.
        lines: all operators of PyTorch with the shapes of their tensors, in order.
    """

    operators: Counter[Operator] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Name of the structure: equal for networks that compute the same on the same shapes."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:32]


def operator_calls(model: nn.Module, example: ExampleInput) -> OperatorCalls:
    """Record the operators of ``model`` on one sample, from shapes where that is possible.

    Args:
        model: left as found.
        example: a call of its ``forward``.
    """
    one = example.small(1)
    try:
        return _recorded(model, one, FakeTensorMode(allow_non_fake_inputs=True))
    except RuntimeError:  # values are needed; what is wrong with the model itself fails again below
        return _recorded(model, one, None)


def _recorded(model: nn.Module, call: ExampleInput, shapes: FakeTensorMode | None) -> OperatorCalls:
    recorder = _Recorder()
    with isolated(model), unfused_kernels(), shapes or nullcontext(), recorder:
        model(*call.args, **call.kwargs)
    return recorder.calls


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = OperatorCalls()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        shapes = [tuple(tensor.shape) for tensor in tensors_in(args)]
        plain = [value for value in args if isinstance(value, bool | int | float | str)]
        self.calls.lines.append(f"{func} {shapes} {plain}")
        if func is _aten.convolution.default:
            x, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
            options = *(tuple(sizes) for sizes in (stride, padding, dilation, output_padding)), groups, transposed
            self._add(x, tuple(weight.shape), options)
        elif func in (_aten.mm.default, _aten.addmm.default):
            x, matrix = args[-2:]
            self._add(x, (matrix.shape[1], matrix.shape[0]))
        elif func is _aten.bmm.default:
            self._add(args[0], tuple(args[1].shape))
        return func(*args, **(kwargs or {}))

    def _add(self, x: Tensor, weight: tuple[int, ...], options: tuple[Any, ...] = ()) -> None:
        self.calls.operators[Operator(tuple(x.shape), weight, options)] += 1


class _Repeated(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @override
    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.layers
        output: Tensor = first(x)
        for layer in rest:
            output = (output + layer(x)).relu()
        return output


class _Products(nn.Module):
    """Batched products whose second factors differ, so that none is computed once for all."""

    @override
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        output = x @ y
        for place in range(1, COPIES):
            output = (output + x @ (y * (1.0 + 0.01 * place))).relu()
        return output
