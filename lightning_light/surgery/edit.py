"""Cut channels out of a live model: Parameter objects stay, and all that refers to them follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_light.errors import SurgeryError
from lightning_light.order import Stage
from lightning_light.surgery.attachment import check_owners
from lightning_light.surgery.attributes import implied_attributes
from lightning_light.surgery.data import set_data
from lightning_light.surgery.optimizer import check_sliceable, slice_state
from lightning_light.surgery.ownership import layers_of
from lightning_light.validation import validated

__all__ = ["Edit", "cut", "named_tensors", "take", "trial"]

Positions = Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True)
class Edit:
    """Hold what a cut changed.

    Attributes:
        shapes: tensor name -> (old shape, new shape).
        kept: tensor name -> dim -> positions that stayed: what a follower (a mask, an average) has to do as well.
        attributes: module name -> attribute -> new value.
        old_attributes: the same, before.
    """

    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    old_attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """Return the entry for the edit log, in plain types. Shapes are not in it, they follow the state dict."""
        plain = {
            module: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            for module, values in self.attributes.items()
        }
        return {"op": "channels", "attributes": plain}


def take(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Select the ``kept`` positions of each dimension of ``tensor``; the largest reduction first."""
    for dim in sorted(kept, key=lambda d: kept[d].numel() / tensor.shape[d]):
        tensor = tensor.index_select(dim, kept[dim].to(tensor.device))
    return tensor


@validated
def cut(
    model: nn.Module,
    kept: Positions,
    *,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
    optimizers: Iterable[Optimizer] = (),
    averaged_models: Sequence[nn.Module] = (),
    method: str = "structured_pruning",
    stage: int = Stage.STRUCTURED,
) -> Edit:
    """Keep only the positions in ``kept`` (tensor name -> dimension -> ascending indices), in place.

    Weights, gradients, optimizer state, buffers, attributes that count channels, and the ``averaged_models`` are cut in
    one go. Everything is read and checked before anything is written: after an error the model is what it was.

    Args:
        model: the live model.
        kept: what stays; tensors and dimensions that are not named stay whole.
        attributes: further attributes to set, module name -> name -> value.
        optimizers: whose state follows.
        averaged_models: averaged copies of ``model``, which are cut like it.
        method: the method that cuts.
        stage: its stage.

    Raises:
        SurgeryError: a name, dimension, index or attribute is not in the model, or an averaged model has another shape.
        UnsupportedError: an optimizer's state cannot be cut, or a later method owns a layer that would be cut.
    """
    optimizers = list(optimizers)
    tensors = named_tensors(model)
    _check(model, tensors, kept)
    _check_attributes(model, attributes or {})
    check_owners(model, layers_of(model, [tensors[name] for name in kept]), method=method, stage=stage)
    copies = [named_tensors(averaged_model) for averaged_model in averaged_models]
    _check_averaged_models(tensors, copies, kept)
    for name in kept:
        for optimizer in optimizers:
            if isinstance(tensors[name], nn.Parameter):
                check_sliceable(optimizer, tensors[name], tuple(tensors[name].shape))
    edit = Edit(kept={name: dict(dims) for name, dims in kept.items()})
    with torch.no_grad():
        new = [{name: take(group[name].detach(), dims) for name, dims in kept.items()} for group in (tensors, *copies)]
        grads = {name: take(grad, kept[name]) for name in kept if (grad := tensors[name].grad) is not None}
        for group, values in zip((tensors, *copies), new, strict=True):
            _commit(group, values, grads if group is tensors else {}, kept, optimizers, edit)
    for module in (model, *averaged_models):
        _set_attributes(module, set(kept), attributes or {}, edit)
    return edit


def _commit(
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    kept: Positions,
    optimizers: Sequence[Optimizer],
    edit: Edit,
) -> None:
    for name, value in values.items():
        tensor, old = tensors[name], tuple(tensors[name].shape)
        edit.shapes.setdefault(name, (old, tuple(value.shape)))
        tensor.grad = None
        set_data(tensor, value)
        tensor.grad = grads.get(name)
        for optimizer in optimizers:
            slice_state(optimizer, tensor, old, kept[name])


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check(model: nn.Module, tensors: Mapping[str, Tensor], kept: Positions) -> None:
    for name, dims in kept.items():
        if name not in tensors:
            raise SurgeryError(
                f"`cut(kept={{{name!r}: ...}})`: expected a name of `named_parameters()` or `named_buffers()`, found "
                f"none in `{type(model).__name__}`. A tied tensor goes by its first owner's name."
            )
        shape = tuple(tensors[name].shape)
        for dim, index in dims.items():
            if not 0 <= dim < len(shape):
                raise SurgeryError(f"`cut(kept={{{name!r}: {{{dim}: ...}}}})`: the tensor has shape {shape}.")
            ascending = bool((index[1:] > index[:-1]).all())
            if index.numel() == 0 or not ascending or int(index[0]) < 0 or int(index[-1]) >= shape[dim]:
                raise SurgeryError(
                    f"`cut(kept={{{name!r}: {{{dim}: ...}}}})`: expected at least one ascending index below "
                    f"{shape[dim]}, found {index.tolist()[:8]}{'...' if index.numel() > 8 else ''}."
                )


def _check_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    modules = dict(model.named_modules())
    for path, values in attributes.items():
        missing = [name for name in values if path not in modules or not hasattr(modules[path], name)]
        if missing:
            found = type(modules[path]).__name__ if path in modules else "no such module"
            raise SurgeryError(
                f"`cut(attributes={{{path!r}: {{{missing[0]!r}: ...}}}})`: expected an attribute that the module has, "
                f"found none of this name ({found}). Name modules as in `named_modules()`."
            )


def _check_averaged_models(
    tensors: Mapping[str, Tensor], copies: Sequence[Mapping[str, Tensor]], kept: Positions
) -> None:
    for copy in copies:
        for name in kept:
            if name not in copy or copy[name].shape != tensors[name].shape:
                found = tuple(copy[name].shape) if name in copy else "nothing"
                raise SurgeryError(
                    f"An averaged copy of the model does not match it at `{name}`: expected shape "
                    f"{tuple(tensors[name].shape)}, found {found}. Was the copy made from another structure?"
                )


def _set_attributes(model: nn.Module, names: set[str], attributes: Mapping[str, Mapping[str, Any]], edit: Edit) -> None:
    wanted: dict[str, dict[str, Any]] = {}
    touched = {name.rpartition(".")[0] for name in names} | {_parent(name) for name in names}
    for path, module in model.named_modules():
        if path in touched:
            wanted[path] = implied_attributes(module)
    for path, values in attributes.items():
        wanted.setdefault(path, {}).update(values)
        if {"embed_dim", "num_heads", "head_dim"} <= set(wanted[path]):  # the two that are given decide
            wanted[path]["head_dim"] = wanted[path]["embed_dim"] // wanted[path]["num_heads"]
    for path, values in wanted.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            old = getattr(module, name)
            if old != value:
                setattr(module, name, value)
                edit.old_attributes.setdefault(path, {}).setdefault(name, old)
                edit.attributes.setdefault(path, {})[name] = value


def _parent(name: str) -> str:
    """The layer that owns a parametrization (``conv.parametrizations.weight.original0``) or a projection: ``conv``."""
    path = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    return path.removesuffix(".out_proj") if path.endswith(".out_proj") else path


@contextmanager
def trial(
    model: nn.Module,
    kept: Positions,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    values: bool = False,
) -> Iterator[Edit]:
    """Give ``model`` the shape it would have after `cut`, inside the block only; yield the attributes that it changes.

    Without ``values`` only the shapes are right: the tensors are views of the first elements, and nothing is copied.
    For forward passes without gradients: nodes that accumulate them, and DDP's hooks on those, live through a trial.
    """
    tensors = named_tensors(model)
    _check(model, tensors, kept)
    before = {name: (tensors[name].data, tensors[name].grad) for name in kept}
    edit = Edit()
    try:
        for name, dims in kept.items():
            tensors[name].grad = None
            tensors[name].data = take(before[name][0], dims) if values else _first(before[name][0], dims)
        _set_attributes(model, set(kept), attributes or {}, edit)
        yield edit
    finally:
        for name, (data, grad) in before.items():
            tensors[name].grad = None
            tensors[name].data = data
            tensors[name].grad = grad
        for path, old in edit.old_attributes.items():
            for name, value in old.items():
                setattr(model.get_submodule(path), name, value)


def _first(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    shape = [kept[dim].numel() if dim in kept else size for dim, size in enumerate(tensor.shape)]
    if tensor.is_contiguous():
        return tensor.reshape(-1)[: math.prod(shape)].view(shape)  # contiguous too, for code that views a parameter
    for dim, positions in kept.items():
        tensor = tensor.narrow(dim, 0, positions.numel())
    return tensor
