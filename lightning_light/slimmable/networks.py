"""The narrower networks of one network: slices of its parameters, and batch-norm statistics of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeAlias, TypedDict

from torch import Tensor, nn
from typing_extensions import override

from lightning_light.batch_norm import layers_with_statistics
from lightning_light.host.patches import RunHook
from lightning_light.isolation import uncompiled
from lightning_light.schema import Context, Rule, TensorOf, damage
from lightning_light.surgery.data import in_layout_of
from lightning_light.surgery.edit import named_tensors, take
from lightning_light.validation import NonNegativeInt

__all__ = ["NarrowNetwork", "PlainNetwork", "statistics_of"]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class _Slices(Rule):
    """Slices of the tensors of the network, and statistics in the shapes of these slices."""

    @override
    def check(self, value: Mapping[str, Any], context: Context, path: str) -> None:
        if context.shapes is None:
            return
        for key, known in (("kept", context.shapes), ("statistics", context.shapes), ("attributes", context.layers)):
            if unknown := sorted(value[key].keys() - known):
                raise damage(f"{path}[{key!r}]", "names in the network", repr(unknown[0]))
        shapes = {name: list(context.shapes[name]) for name in (*value["kept"], *value["statistics"])}
        for name, dims in value["kept"].items():
            for dim, index in dims.items():
                size = shapes[name][dim] if dim < len(shapes[name]) else 0
                if not index.numel() or bool((index[1:] <= index[:-1]).any()) or int(index[-1]) >= size:
                    raise damage(f"{path}['kept'][{name!r}][{dim}]", f"ascending positions below {size}", "others")
                shapes[name][dim] = index.numel()
        for name, tensor in value["statistics"].items():
            if list(tensor.shape) != shapes[name]:
                raise damage(f"{path}['statistics'][{name!r}]", f"the shape {shapes[name]}", f"{list(tensor.shape)}")


_Positions: TypeAlias = Annotated[Tensor, TensorOf("integer", 1, 0)]


class _Plain(TypedDict):
    kept: dict[str, dict[NonNegativeInt, _Positions]]
    attributes: dict[str, dict[str, NonNegativeInt | tuple[NonNegativeInt, ...]]]
    statistics: dict[str, Annotated[Tensor, TensorOf("real")]]


PlainNetwork: TypeAlias = Annotated[_Plain, _Slices()]
"""A narrower network, in plain types: tensor name -> dimension -> positions; attributes; batch-norm statistics."""


def statistics_of(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]], part: str) -> dict[str, Tensor]:
    """Copy the batch-norm statistics of the part of ``model`` named ``part``, at the positions that are kept."""
    buffers = dict(model.named_buffers())
    layers = [layer for layer, _ in layers_with_statistics(model.get_submodule(part))]
    names = [".".join(filter(None, (part, layer, name))) for layer in layers for name in _STATISTICS]
    return {name: take(buffers[name], kept.get(name, {})).clone() for name in names if name in buffers}


class NarrowNetwork:
    """Call a network with a part of its channels; gradients go to its parameters.

    Args:
        model: the LightningModule; it is whole again after each call.
        plain: of the narrower network. Its statistics are updated in place.
        part: path of the module that is called.
    """

    def __init__(self, model: nn.Module, plain: _Plain, part: str) -> None:
        tensors = named_tensors(model)
        plain["statistics"] = {name: value.to(tensors[name].device) for name, value in plain["statistics"].items()}
        self._model, self._network, self._statistics = model, model.get_submodule(part), plain["statistics"]
        self._kept = {
            name: {dim: index.to(tensors[name].device) for dim, index in dims.items()}
            for name, dims in plain["kept"].items()
            if name not in self._statistics
        }
        self._attributes = [(vars(model.get_submodule(path)), new) for path, new in plain["attributes"].items()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the narrower network. Compiled parts run uncompiled, hooks of a run do not act."""
        tensors = named_tensors(self._model)
        whole = ((tensors[name], dims) for name, dims in self._kept.items())
        new = {id(tensor): in_layout_of(tensor, take(tensor, dims)) for tensor, dims in whole}
        new |= {id(tensors[name]): statistic for name, statistic in self._statistics.items()}
        with uncompiled(self._model), RunHook.paused(), _updated([*self._new_entries(new), *self._attributes]):
            return self._network(*args, **kwargs)

    def _new_entries(self, new: Mapping[int, Tensor]) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        """Yield tables of modules, and what takes the place of tensors there, under all names that these have."""
        for module in self._network.modules():
            for table in (module._parameters, module._buffers):
                yield table, {name: new[id(tensor)] for name, tensor in table.items() if id(tensor) in new}


@contextmanager
def _updated(changes: Iterable[tuple[dict[str, Any], Mapping[str, Any]]]) -> Iterator[None]:
    """Update dicts inside the block."""
    before = [(table, {name: table[name] for name in new}, new) for table, new in changes]
    try:
        for table, _, new in before:
            table.update(new)
        yield
    finally:
        for table, old, _ in before:
            table.update(old)
