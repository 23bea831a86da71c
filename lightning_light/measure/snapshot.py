"""Take a snapshot of a model: the cost, sparsity and bit width of its layers, and its totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Annotated, Any, TypedDict

from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lightning_light.formatting import DataTable, Tabular, human_bytes, human_count, human_percent
from lightning_light.isolation import isolated
from lightning_light.measure.cost import Cost, count_params
from lightning_light.measure.layer_table import LayerRow, effective_macs, layer_table, layer_weights, weight_matrices
from lightning_light.measure.size import tensor_bytes
from lightning_light.measure.sparsity import zero_fraction
from lightning_light.schema import FieldsOf
from lightning_light.validation import Fraction, NonNegativeFloat, NonNegativeInt, validated

__all__ = ["QUANTITIES", "PlainSnapshot", "Snapshot", "layer_stats", "matrix_layers", "structure", "take_snapshot"]

QUANTITIES = ("rank", "energy_kept", "reconstruction_error", "coded_bits", "weight_bits", "activation_bits")
"""Rank of a layer's factors; fraction of the weight's energy that they keep; relative error of their product; bits per
weight in a coded file, codebook included; bits of the layer's weight and of its input in computations."""


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
class Snapshot(Tabular):
    """The layers and totals of a model at one step.

    Attributes:
        rows: one per layer, in the model's order.
        params: elements of all parameters; shared ones count once.
        macs: MACs of one forward pass; None if they were not counted.
        bytes: of all parameters and persistent buffers, as they will be stored: fake-quantized weights as int8.
        sparsity: fraction of zeros among all weights of two or more dimensions, in [0, 1].
        bits: mean bit width per weight, of its fake quantization or of its data type.
        stats: layer -> quantity -> a number that a method reports, such as ``"weight_bits"``.
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

    @property
    def bops(self) -> int | None:
        """Return the bit operations, MACs times the bits of weight and input (32 where float) of each layer."""
        if self.macs is None:
            return None
        inputs = {name: numbers.get("activation_bits", 32.0) for name, numbers in self.stats.items()}
        return round(sum(row.macs * (row.bits or 32.0) * inputs.get(row.name, 32.0) for row in self.rows))

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per layer."""

        def cells(name: str, channels: int | None, part: LayerRow | Snapshot) -> tuple[str, ...]:
            costs = human_count(part.params), "" if self.macs is None else human_count(part.macs or 0)
            shares = human_percent(part.sparsity), f"{part.bits:.3g}"
            return name, "" if channels is None else str(channels), *costs, human_bytes(part.bytes), *shares

        lines = tuple(cells(row.name or "(model)", row.channels_out, row) for row in self.rows)
        headers = ("layer", "channels", "params", "MACs", "size", "sparsity", "bits")
        return [DataTable(headers, lines, (cells("total", None, self),))]

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
        pairs = [(row, had.get(row.name, row)) for row in self.rows]
        rows = tuple(replace(row, sparsity=was.sparsity, dead_filters=was.dead_filters) for row, was in pairs)
        return replace(self, rows=rows, sparsity=earlier.sparsity)


@validated
def take_snapshot(
    model: nn.Module, cost: Cost | None = None, stats: Mapping[str, Mapping[str, float]] | None = None
) -> Snapshot:
    """Take a snapshot of ``model``, which is left as it is.

    Args:
        model: on any device, in any mode.
        cost: from `count_cost` on a model of the same structure; without it MACs are not reported.
        stats: layer -> quantity -> a number that a method reports; layers with ``weight_bits`` are fake-quantized and
            count as they will be stored: a byte per weight, a float scale per output channel.

    Example:
        >>> from lightning_light.measure import count_cost
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> snapshot = take_snapshot(model, count_cost(model, (torch.zeros(1, 4),)))
        >>> snapshot.params, snapshot.macs, snapshot.bytes
        (58, 48, 232)
    """
    known, numbers = cost or count_params(model), stats or {}
    with isolated(model):  # reading a parametrized weight may change its state
        rows = _merged(layer_table(model, _with_parametrized(model, known)))
        sparsity = zero_fraction(weight_matrices(model))
        layers = reversed(list(model.named_modules()))  # a shared weight belongs to the first
        weights = {weight: name for name, module in layers for weight in layer_weights(module)}
    saved = Counter[str]()
    for weight, name in weights.items():
        if _is_quantized(name, weight, numbers):  # int8: a byte per element, and a float scale per output channel
            saved[name] += weight.numel() * (weight.element_size() - 1) - 4 * len(weight)
    elements = sum(weight.numel() for weight in weights)
    bits = sum(_bits_of(name, weight, numbers) * weight.numel() for weight, name in weights.items())
    return Snapshot(
        rows=tuple(_stored(row, saved[row.name], numbers) for row in rows),
        params=known.params,
        macs=None if cost is None else cost.macs,
        bytes=tensor_bytes(model) - sum(saved.values()),
        sparsity=sparsity,
        bits=bits / elements if elements else 0.0,
        stats=numbers,
    )


def layer_stats(state: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Map layer -> quantity -> number, from the entry ``layers`` of each method's state.

    Args:
        state: `CompressionState.state`: method -> its state. Methods without such an entry are skipped.

    Example:
        >>> layer_stats({"low_rank": {"layers": {"conv": {"form": "channel", "rank": 8.0}}, "events": 1}})
        {'conv': {'rank': 8.0}}
    """
    stats: dict[str, dict[str, float]] = {}
    for kept in state.values():
        layers = kept.get("layers") if isinstance(kept, Mapping) else None
        for name, entry in layers.items() if isinstance(layers, Mapping) else ():
            found = {key: float(entry[key]) for key in QUANTITIES if isinstance(entry, Mapping) and key in entry}
            if found:
                stats.setdefault(name, {}).update(found)
    return stats


def _is_quantized(layer: str, weight: Tensor, stats: Mapping[str, Mapping[str, float]]) -> bool:
    """Check whether a weight of ``layer`` is fake-quantized, by the numbers of the methods."""
    return weight.ndim > 1 and "weight_bits" in stats.get(layer, {})


def _bits_of(layer: str, weight: Tensor, stats: Mapping[str, Mapping[str, float]]) -> float:
    """Return the bit width of a weight of ``layer``: of its fake quantization, else of its data type."""
    quantized = _is_quantized(layer, weight, stats)
    return stats[layer]["weight_bits"] if quantized else 8.0 * weight.element_size()


def _stored(row: LayerRow, saved: int, stats: Mapping[str, Mapping[str, float]]) -> LayerRow:
    bits = stats.get(row.name, {}).get("weight_bits", row.bits)
    return replace(row, bits=bits, bytes=row.bytes - saved)


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
            merged[owner] = replace(
                first, params=first.params + row.params, macs=first.macs + row.macs, bytes=first.bytes + row.bytes
            )
        else:
            merged[owner] = replace(row, type=row.type.removeprefix("Parametrized"))
    return list(merged.values())
