"""Count the multiply-accumulates (MACs) and parameters of a model, in total and per module."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from lightning_light.formatting import DataTable, Tabular, human_count
from lightning_light.isolation import isolated, unfused_kernels
from lightning_light.merging import is_training_branch
from lightning_light.module_stack import ModuleCall, ModuleStack
from lightning_light.nested import tensors_in
from lightning_light.validation import validated

__all__ = ["Cost", "count_cost", "count_params"]


@dataclass(frozen=True)
class Cost(Tabular):
    """MACs of one forward pass, and parameters.

    Attributes:
        macs: of the whole batch that was given; give a batch of one for the cost per sample.
        params: elements of all parameters; shared ones count once.
        macs_by_module: by name, those that ran in the module itself and not in a submodule; sums to ``macs``.
        params_by_module: by name, those that the module itself holds and no earlier one; sums to ``params``.
    """

    macs: int
    params: int
    macs_by_module: dict[str, int]
    params_by_module: dict[str, int]

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per module."""
        names = dict.fromkeys((*self.macs_by_module, *self.params_by_module))
        counts = (self.macs_by_module, self.params_by_module)
        lines = [(name or "(model)", *(human_count(part.get(name, 0)) for part in counts)) for name in names]
        total = ("total", human_count(self.macs), human_count(self.params))
        return [DataTable(("module", "MACs", "params"), tuple(lines), (total,))]


@validated
def count_cost(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    shapes_only: bool | None = None,
) -> Cost:
    """Count the MACs of ``model(*args, **kwargs)`` in evaluation mode, and the parameters.

    Counted are convolutions (transposed and grouped too), matrix products in any form (linear layers, attention,
    ``einsum``, recurrent layers) and bilinear layers: half of what `torch.utils.flop_counter` finds. Not counted are
    bias additions, activations, softmax, norms, pooling, embeddings, elementwise operations of recurrent layers, and
    custom or quantized kernels. Causal or padded attention counts in full, and so do weights that are zero. A module
    that runs twice counts twice. Of a layer that is expanded to branches what it merges into counts.

    The model is left as found, buffers, modes and random states included. Forward hooks that only observe do not run.

    Args:
        model: on any device; its ``forward`` is called once or twice.
        args: positional inputs of ``forward``.
        kwargs: keyword inputs of ``forward``.
        shapes_only: propagate only shapes, without computing; by default where that is faster, for all but small
            models. Where it fails, because control flow depends on values or an operator has no shape function, the
            model runs on the data.

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
    if shapes_only is None:
        shapes_only = not _is_small(model, (args, kwargs))
    macs = _macs_by_module(model, args, kwargs or {}, shapes_only=shapes_only)
    return Cost(sum(macs.values()), sum(params.values()), macs, params)


def count_params(model: nn.Module) -> Cost:
    """Count the parameters alone, without running the model.

    Raises:
        ValueError: a parameter has no shape yet (lazy layers).
    """
    params = _params_by_module(model)
    return Cost(0, sum(params.values()), {}, params)


def _params_by_module(model: nn.Module) -> dict[str, int]:
    seen: set[nn.Parameter] = set()
    counts: dict[str, int] = {}
    merged_away = is_training_branch(model)
    for name, module in model.named_modules():
        if merged_away(name):
            continue
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


def _is_small(model: nn.Module, inputs: Any) -> bool:
    """Whether a pass takes less time than propagating shapes, which is about a millisecond per operator.

    Layers are taken to use each weight at most once per element of the inputs.
    """
    elements = sum(tensor.numel() for tensor in tensors_in(inputs))
    return elements * sum(parameter.numel() for parameter in model.parameters()) < _SMALL


_SMALL = 10**9


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: FakeTensorMode | None
) -> dict[str, int]:
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    flops = _FlopsByModule(counter.get_total_flops)
    with isolated(model), unfused_kernels(), flops.watching(model), shapes or nullcontext(), counter:
        model(*args, **kwargs)
        flops.update()
    merged_away = is_training_branch(model)
    return {name: count // 2 for name, count in flops.counts.items() if count and not merged_away(name)}


class _NoModules:
    """Stands in for the modules that torch's counter follows: it fails on a module that is called with a parameter."""

    parents: ClassVar[frozenset[str]] = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _FlopsByModule(ModuleStack):
    """Assign what was counted since the last call or return to the innermost module that was running."""

    def __init__(self, total: Callable[[], int]) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._total = total
        self._assigned = 0

    @override
    def entered(self, call: ModuleCall) -> None:
        self.update(self.calls[-2] if len(self.calls) > 1 else None)

    @override
    def left(self, call: ModuleCall, output: Any) -> None:
        self.update(call)

    def update(self, call: ModuleCall | None = None) -> None:
        total = self._total()
        self.counts[call.name if call is not None else ""] += total - self._assigned
        self._assigned = total


# Products that are not in torch's own table. The formula of an operator gets shapes in place of tensors.


def _bilinear(
    left: Sequence[int], weight: Sequence[int], right: Sequence[int], *_: object, out_shape: Sequence[int], **__: object
) -> int:
    """Count two products per output and pair of inputs: one for the pair, one for the weight."""
    return 2 * math.prod(out_shape) * left[-1] * right[-1]


_aten = torch.ops.aten
_FORMULAS: dict[Any, Any] = {
    _aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
    _aten.addmv: lambda _, matrix, *__, **___: 2 * math.prod(matrix),
    _aten.dot: lambda vector, *_, **__: 2 * math.prod(vector),
    _aten._trilinear: _bilinear,
}
