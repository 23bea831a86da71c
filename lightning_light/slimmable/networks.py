"""The narrower networks of one network: slices of its parameters, and batch-norm statistics of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeAlias, TypedDict

from torch import Tensor, nn
from typing_extensions import override

from lightning_light.batch_norm import layers_with_statistics
from lightning_light.host.patches import RunHook
from lightning_light.isolation import uncompiled
from lightning_light.schema import Context, Rule, TensorOf, damage
from lightning_light.surgery.edit import take
from lightning_light.validation import NonNegativeInt

__all__ = ["NarrowNetwork", "PlainNetwork", "statistics_of"]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class _Slices(Rule):
    """Slices of the tensors of the network, and statistics in the shapes of these slices."""

    @override
    def check(self, value: Mapping[str, Any], context: Context, path: str) -> None:
        if context.shapes is None:
            return
        tensors, layers = context.shapes, context.layers
        for key, known in (("kept", tensors), ("statistics", tensors), ("attributes", layers)):
            if unknown := sorted(value[key].keys() - known):
                raise damage(f"{path}[{key!r}]", "names in the network", repr(unknown[0]))
        for name, dims in value["kept"].items():
            for dim, index in dims.items():
                sizes = dict(enumerate(tensors[name]))
                rising = index.numel() > 0 and bool((index[1:] > index[:-1]).all())
                if not rising or int(index[-1]) >= sizes.get(dim, 0):
                    place = f"{path}['kept'][{name!r}][{dim}]"
                    raise damage(place, f"ascending positions below {sizes.get(dim, 0)}", "others")
        for name, tensor in value["statistics"].items():
            dims = value["kept"].get(name, {})
            shape = tuple(dims[dim].numel() if dim in dims else size for dim, size in enumerate(tensors[name]))
            if tuple(tensor.shape) != shape:
                raise damage(f"{path}['statistics'][{name!r}]", f"the shape {shape}", str(tuple(tensor.shape)))


_Positions: TypeAlias = Annotated[Tensor, TensorOf("integer", 1, 0)]


class _Plain(TypedDict):
    kept: dict[str, dict[NonNegativeInt, _Positions]]
    attributes: dict[str, dict[str, NonNegativeInt | tuple[NonNegativeInt, ...]]]
    statistics: dict[str, Annotated[Tensor, TensorOf("real", None, None)]]


PlainNetwork: TypeAlias = Annotated[_Plain, _Slices()]
"""A narrower network, in plain types: tensor name -> dimension -> positions; attributes; batch-norm statistics."""


def statistics_of(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]], part: str) -> dict[str, Tensor]:
    """Copy the batch-norm statistics of the part of ``model`` named ``part``, at the positions that are kept."""
    buffers = dict(model.named_buffers())
    layers = (name for name, _ in layers_with_statistics(model) if _within(name, part) is not None)
    names = (f"{layer}.{name}".lstrip(".") for layer in layers for name in _STATISTICS)
    return {name: take(buffers[name], kept.get(name, {})).clone() for name in names if name in buffers}


class NarrowNetwork:
    """Call a network with a part of its channels; gradients go to its parameters.

    Args:
        model: the LightningModule; its attributes are those of the whole network again after each call.
        plain: of the narrower network. Its statistics are updated in place.
        part: path of the module that is called.
    """

    def __init__(self, model: nn.Module, plain: _Plain, part: str) -> None:
        buffers = dict(model.named_buffers())
        plain["statistics"] = {name: value.to(buffers[name].device) for name, value in plain["statistics"].items()}
        self._network = model.get_submodule(part)
        self._statistics = {str(_within(name, part)): value for name, value in plain["statistics"].items()}
        self._attributes = [(model.get_submodule(path), values) for path, values in plain["attributes"].items()]
        device = next(model.parameters()).device
        self._kept = {
            key: {dim: index.to(device) for dim, index in dims.items()}
            for name, dims in plain["kept"].items()
            if (key := str(_within(name, part))) not in self._statistics
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the narrower network. Compiled parts run uncompiled, hooks of a run do not act."""
        with uncompiled(self._network), RunHook.paused(), self._narrowed():
            return self._network(*args, **kwargs)

    @contextmanager
    def _narrowed(self) -> Iterator[None]:
        """Put the slices and the statistics in the place of the tensors, under all names that these have."""
        tensors = {**dict(self._network.named_parameters()), **dict(self._network.named_buffers())}
        new = {id(tensors[name]): take(tensors[name], dims) for name, dims in self._kept.items()}
        new |= {id(tensors[name]): statistic for name, statistic in self._statistics.items()}
        modules: list[Any] = list(self._network.modules())
        tables = [table for module in modules for table in (module._parameters, module._buffers)]
        before = [(table, dict(table)) for table in tables if not new.keys().isdisjoint(map(id, table.values()))]
        attributes = [(module, {name: getattr(module, name) for name in old}) for module, old in self._attributes]
        try:
            for table, old in before:
                table.update({name: new.get(id(tensor), tensor) for name, tensor in old.items()})
            _set(self._attributes)
            yield
        finally:
            for table, old in before:
                table.update(old)
            _set(attributes)


def _set(attributes: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, values in attributes:
        for name, value in values.items():
            setattr(module, name, value)


def _within(name: str, part: str) -> str | None:
    """Return ``name`` as it is below ``part``; None for what lies outside."""
    if not part or name == part:
        return name.removeprefix(part)
    return name.removeprefix(f"{part}.") if name.startswith(f"{part}.") else None
