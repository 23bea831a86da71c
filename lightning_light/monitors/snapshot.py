"""Take a snapshot of a model: the cost, sparsity and bit width of its layers, and its totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Annotated, Any, TypedDict

from torch import nn
from torch.nn.utils import parametrize

from lightning_light.isolation import isolated
from lightning_light.measure.cost import Cost, count_params
from lightning_light.measure.layer_table import LayerRow, effective_macs, layer_table, layer_weights, weight_matrices
from lightning_light.measure.size import tensor_bytes
from lightning_light.measure.sparsity import zero_fraction
from lightning_light.surgery.schema import FieldsOf
from lightning_light.validation import Fraction, NonNegativeFloat, NonNegativeInt, validated

__all__ = ["PlainSnapshot", "Snapshot", "matrix_layers", "row_bytes", "structure", "take_snapshot"]


class PlainSnapshot(TypedDict):
    """A `Snapshot` in a checkpoint."""

    rows: list[Annotated[list[Any], FieldsOf(LayerRow)]]
    params: NonNegativeInt
    macs: NonNegativeInt | None
    bytes: NonNegativeInt
    sparsity: Fraction
    bits: NonNegativeFloat
    stats: dict[str, dict[str, float]]
    deflated: NonNegativeInt | None


@dataclass(frozen=True)
class Snapshot:
    """The layers and totals of a model at one step.

    Attributes:
        rows: one per layer, in the model's order.
        params: elements of all parameters; shared ones count once.
        macs: MACs of one forward pass; None if they were not counted.
        bytes: of all parameters and persistent buffers.
        sparsity: fraction of zeros among all weights of two or more dimensions, in [0, 1].
        bits: mean bit width per weight.
        stats: layer -> quantity -> number of a method, from `layer_stats`.
        deflated: bytes after lossless compression; None if they were not measured.
    """

    rows: tuple[LayerRow, ...]
    params: int
    macs: int | None
    bytes: int
    sparsity: float
    bits: float
    stats: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    deflated: int | None = None

    @property
    def dead_filters(self) -> int:
        """Count the outputs whose weights are all zero, of all layers."""
        return sum(row.dead_filters for row in self.rows)

    @property
    def effective_macs(self) -> int | None:
        """Count the MACs whose weight is nonzero; None if MACs were not counted."""
        return None if self.macs is None else effective_macs(self.rows)

    def plain(self) -> dict[str, Any]:
        """Return plain types, for a checkpoint."""
        stats = {name: dict(numbers) for name, numbers in self.stats.items()}
        return {**vars(self), "rows": [list(astuple(row)) for row in self.rows], "stats": stats}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Snapshot:
        """Restore what `plain` returned."""
        return cls(**{**plain, "rows": tuple(LayerRow(*row) for row in plain["rows"])})

    def with_sparsity_of(self, earlier: Snapshot) -> Snapshot:
        """Return this snapshot with the sparsity of an ``earlier`` one of the same structure."""
        had = {row.name: row for row in earlier.rows}
        rows = (
            replace(row, sparsity=had[row.name].sparsity, dead_filters=had[row.name].dead_filters)
            if row.name in had
            else row
            for row in self.rows
        )
        return replace(self, rows=tuple(rows), sparsity=earlier.sparsity)


@validated
def take_snapshot(
    model: nn.Module, cost: Cost | None = None, stats: Mapping[str, Mapping[str, float]] | None = None
) -> Snapshot:
    """Take a snapshot of ``model``, which is left as it is.

    Args:
        model: on any device, in any mode.
        cost: from `count_cost` on a model of the same structure; without it MACs are not reported.
        stats: per-layer numbers of the methods, from `layer_stats`.

    Example:
        >>> from lightning_light.measure import count_cost
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> snapshot = take_snapshot(model, count_cost(model, (torch.zeros(1, 4),)))
        >>> snapshot.params, snapshot.macs, snapshot.bytes
        (58, 48, 232)
    """
    known = cost or count_params(model)
    with isolated(model):  # reading a parametrized weight may change its state
        rows = layer_table(model, _with_parametrized(model, known))
        sparsity = zero_fraction(weight_matrices(model))
        weights = dict.fromkeys(weight for module in model.modules() for weight in layer_weights(module))
        elements = sum(weight.numel() for weight in weights)
        bits = sum(8 * weight.element_size() * weight.numel() for weight in weights)
    return Snapshot(
        rows=tuple(_merged(rows)),
        params=known.params,
        macs=None if cost is None else cost.macs,
        bytes=tensor_bytes(model),
        sparsity=sparsity,
        bits=bits / elements if elements else 0.0,
        stats=stats or {},
    )


def matrix_layers(model: nn.Module) -> list[str]:
    """List the layers that have a weight of two or more dimensions."""
    with isolated(model):
        return [
            name for name, module in model.named_modules() if any(weight.ndim > 1 for weight in layer_weights(module))
        ]


def structure(model: nn.Module) -> int:
    """Return a hash of modules, shapes and data types, which does not depend on the values of weights.

    Comparable within one process only.
    """
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    tensors = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in model.named_parameters())
    return hash((modules, tensors))


def row_bytes(row: LayerRow) -> int:
    """Return the bytes of a layer's own parameters, at the bit width of its weights."""
    return round(row.params * row.bits / 8)


def _with_parametrized(model: nn.Module, cost: Cost) -> Cost:
    """Return ``cost`` with an entry for every parametrized layer, even one without parameters of its own."""
    layers = {name: 0 for name, module in model.named_modules() if parametrize.is_parametrized(module)}
    return replace(cost, params_by_module=layers | cost.params_by_module)


def _merged(rows: list[LayerRow]) -> list[LayerRow]:
    """Merge the rows of parametrizations into the row of the layer that has them."""
    merged: dict[str, LayerRow] = {}
    for row in rows:
        owner = row.name.partition(".parametrizations.")[0]
        if owner in merged:
            first = merged[owner]
            merged[owner] = replace(first, params=first.params + row.params, macs=first.macs + row.macs)
        else:
            merged[owner] = replace(row, type=row.type.removeprefix("Parametrized"))
    return list(merged.values())
