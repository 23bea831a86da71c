"""Effective values of layers that have been replaced: what code reads of a layer stays readable.

Code reads a layer's ``weight``, for instance its ``dtype``, or multiplies with it. A replacement has the weight in
other tensors, so it computes the weight when its values are needed; shape, type and device are known before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lightning_light.errors import UnsupportedError

__all__ = ["EffectiveLayer", "EffectiveTensor"]

_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_meta", "grad")
} | {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__}
_METADATA |= {Tensor.is_floating_point, torch.is_floating_point, torch.numel, Tensor.is_complex, torch.is_complex}
_WRITES = {"__setitem__", "__set__", "retain_grad", "register_hook", "backward"}


class EffectiveTensor(Tensor):
    """A tensor that a layer computes from its own tensors, differentiably, when its values are needed.

    It is not a Parameter. A view of its values is an `EffectiveTensor` too.

    Args:
        name: of what it stands for, for error messages.
        compute: computes the values.
        shape: of the values.
        like: has their type, device and ``requires_grad``.
    """

    _name: str
    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, name: str, compute: Callable[[], Tensor], shape: Sequence[int], like: Tensor) -> EffectiveTensor:
        """Make a tensor without values."""
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "requires_grad": like.requires_grad}
        made: EffectiveTensor = Tensor._make_wrapper_subclass(cls, shape, **options)
        made._name, made._compute = name, compute
        return made

    def __init__(self, *_: Any) -> None: ...

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = next(iter((*args, *kwargs.values())), None)
        first = first if isinstance(first, EffectiveTensor) else None
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **kwargs)
            if func is Tensor.is_leaf.__get__ and first is not None:  # type: ignore[attr-defined]
                return not first.requires_grad
            if func is Tensor.__repr__ and first is not None:
                return f"EffectiveTensor({first._name}, {first._compute()!r})"
        written = first if _writes(func.__name__) else kwargs.get("out")
        if isinstance(written, EffectiveTensor):
            raise UnsupportedError(
                f"`{written._name}` in `{func.__name__}`: expected code that reads it, found code that writes into it. "
                "The layer has been replaced by layers that compute this tensor, and what is written would be lost. "
                "Change the parameters of the replacement, see its `named_parameters()`, or exclude the layer from "
                "`targets`."
            )
        return _read(func, args, kwargs)

    @classmethod
    @override
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as torch documents it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute the values where code reaches an operator without `__torch_function__`."""
        args, kwargs = tree_map_only(EffectiveTensor, lambda held: held._compute().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name.startswith("__i") and name not in {"__int__", "__index__", "__invert__"}
    return in_place or operator or name in _WRITES


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """Call ``func`` on the values; what shares their memory stays read-only."""
    values: dict[int, tuple[Tensor, str]] = {}

    def value_of(held: EffectiveTensor) -> Tensor:
        if id(held) not in values:
            values[id(held)] = held._compute(), held._name
        return values[id(held)][0]

    result = func(*tree_map_only(EffectiveTensor, value_of, args), **tree_map_only(EffectiveTensor, value_of, kwargs))
    memory = {value.untyped_storage()._cdata: name for value, name in values.values()}

    def guarded(tensor: Tensor) -> Tensor:
        name = None if isinstance(tensor, EffectiveTensor) else memory.get(tensor.untyped_storage()._cdata)
        return tensor if name is None else EffectiveTensor(name, lambda: tensor, tensor.shape, tensor)

    return tree_map_only(Tensor, guarded, result)


class EffectiveLayer(nn.Module):
    """Base class of what replaces a layer: it has the readable attributes of that layer.

    A subclass implements `effective` and `read`. Attributes that it refuses to set are those that it computes.
    """

    __jit_unused_properties__ = ("weight", "bias")

    def effective(self, name: str) -> tuple[Callable[[], Tensor], Sequence[int], Tensor] | None:
        """Return how the tensor ``name`` of the replaced layer is computed, its shape, and a tensor of its type.

        None where the layer has None. Called for ``weight`` and ``bias``.
        """
        raise NotImplementedError

    def read(self, name: str) -> Any:
        """Return another attribute of the replaced layer.

        Raises:
            AttributeError: it has none of this name.
        """
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def effective_tensor(self, name: str) -> Tensor | None:
        """Return what the replaced layer had as ``name``; plain values where code is traced or compiled."""
        found = self.effective(name)
        if found is None:
            return None
        compute, shape, like = found
        if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
            return compute()
        return EffectiveTensor(f"{type(self).__name__}.{name}", compute, shape, like)

    @property
    def weight(self) -> Any:
        """The weight of the replaced layer, an `EffectiveTensor`."""
        return self.effective_tensor("weight")

    @property
    def bias(self) -> Any:
        """The bias of the replaced layer, an `EffectiveTensor`, or None."""
        return self.effective_tensor("bias")

    @override
    def __getattr__(self, name: str) -> Any:
        held = any(name in vars(self).get(table, ()) for table in ("_parameters", "_buffers", "_modules"))
        return super().__getattr__(name) if held or name.startswith("_") else self.read(name)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            raise UnsupportedError(
                f"`{type(self).__name__}.{name} = ...`: expected code that reads it, found code that replaces it. The "
                "layer has been replaced by layers that compute it: change their parameters, or exclude the layer from "
                "`targets`."
            )
        super().__setattr__(name, value)
