"""What one forward pass costs: multiply-accumulates and parameters, in total and a module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from lightning_light.measure.isolation import isolated, unfused_kernels

__all__ = ["Cost", "count_cost", "count_params"]


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one forward pass, and parameters.

    Attributes:
        macs: of the whole batch that was given; give a batch of one for the cost of one sample.
        params: elements of all parameters, each counted once however often it is shared.
        macs_by_module: by name, what ran in the module itself and in none below it; sums to ``macs``.
        params_by_module: by name, what the module itself holds and no earlier one did; sums to ``params``.
    """

    macs: int
    params: int
    macs_by_module: dict[str, int]
    params_by_module: dict[str, int]


def count_cost(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, shapes_only: bool = True
) -> Cost:
    """Count the multiply-accumulates of ``model(*args, **kwargs)`` in evaluation mode.

    Counted are convolutions (transposed, grouped), matrix products in whatever form (linear layers, attention,
    ``einsum``, recurrent layers) and bilinear layers, half of what `torch.utils.flop_counter` finds. Not counted:
    additions of a bias, activations, softmax, norms, pooling, embeddings, the gates of recurrent layers apart from
    their products, and custom or quantized kernels. A causal or padded attention counts in full, and zeros count as
    any other weight. A module that runs twice counts twice.

    The model is left as found: see `isolated`. Its forward hooks do not run.

    Args:
        model: on any device; its ``forward`` is called once or twice.
        args: positional inputs of ``forward``.
        kwargs: keyword inputs of ``forward``.
        shapes_only: pass only shapes through the model, nothing is computed. Where that fails, because the way
            through the model depends on values, or an operator knows no shapes, the model is run on the data.

    Raises:
        ValueError: a parameter has no shape yet (lazy layers).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
        >>> cost = count_cost(model, (torch.zeros(1, 3, 8, 8),))
        >>> cost.macs, cost.params
        (10656, 3114)
        >>> cost.macs_by_module
        {'0': 7776, '2': 2880}
    """
    params = _params_by_module(model)
    macs = _macs_by_module(model, args, kwargs or {}, shapes_only=shapes_only)
    return Cost(sum(macs.values()), sum(params.values()), macs, params)


def count_params(model: nn.Module) -> Cost:
    """The parameters alone: nothing is run, and there are no products.

    Raises:
        ValueError: a parameter has no shape yet (lazy layers).
    """
    params = _params_by_module(model)
    return Cost(0, sum(params.values()), {}, params)


def _params_by_module(model: nn.Module) -> dict[str, int]:
    seen: set[nn.Parameter] = set()
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in seen]
        if any(is_lazy(parameter) for parameter in own):
            raise ValueError(
                f"`count_cost` on `{type(model).__name__}`: expected parameters with shapes, found the lazy layer "
                f"{name!r}. Run the model once on a batch, then count."
            )
        seen.update(own)
        if own:
            counts[name] = sum(parameter.numel() for parameter in own)
    return counts


def _macs_by_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, shapes_only: bool
) -> dict[str, int]:
    if shapes_only:
        try:
            return _run(model, args, kwargs, FakeTensorMode(allow_non_fake_inputs=True))
        except RuntimeError:  # values are needed; what is wrong with the model itself fails again below
            pass
    return _run(model, args, kwargs, None)


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: FakeTensorMode | None
) -> dict[str, int]:
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    compression_state = _Ledger(model, counter.get_total_flops)
    with ExitStack() as stack:
        stack.enter_context(isolated(model))
        stack.enter_context(unfused_kernels())
        stack.callback(register_module_forward_pre_hook(compression_state.enter).remove)
        stack.callback(register_module_forward_hook(compression_state.leave, always_call=True).remove)
        if shapes is not None:
            stack.enter_context(shapes)
        stack.enter_context(counter)
        model(*args, **kwargs)
    return compression_state.close()


class _Ledger:
    """Books what was counted since the last entry or exit to the innermost module at the time."""

    def __init__(self, model: nn.Module, total: Callable[[], int]) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._total = total
        self._booked = 0
        self._stack = [""]
        self._flops = dict.fromkeys(self._names.values(), 0)

    def enter(self, module: nn.Module, args: object) -> None:
        self._book()
        self._stack.append(self._names.get(module, self._stack[-1]))  # a stranger counts for its caller

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        self._book()
        self._stack.pop()

    def close(self) -> dict[str, int]:
        self._book()
        return {name: flops // 2 for name, flops in self._flops.items() if flops}

    def _book(self) -> None:
        total = self._total()
        self._flops[self._stack[-1]] += total - self._booked
        self._booked = total


# Products that torch's own table leaves out. An operator's formula sees shapes in place of tensors.


def _matrix_vector(matrix: Sequence[int], *_: object, **__: object) -> int:
    return 2 * math.prod(matrix)


def _add_matrix_vector(_: object, matrix: Sequence[int], *__: object, **___: object) -> int:
    return 2 * math.prod(matrix)


def _bilinear(
    left: Sequence[int], weight: Sequence[int], right: Sequence[int], *_: object, out_shape: Sequence[int], **__: object
) -> int:
    """Every output needs every pair of inputs: a product for the pair, one for the weight."""
    return 2 * math.prod(out_shape) * left[-1] * right[-1]


_aten = torch.ops.aten
_FORMULAS: dict[Any, Any] = {
    _aten.mv: _matrix_vector,
    _aten.addmv: _add_matrix_vector,
    _aten.dot: _matrix_vector,
    _aten._trilinear: _bilinear,
}
