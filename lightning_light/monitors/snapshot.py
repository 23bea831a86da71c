"""What a model is at one moment: its layers, its totals; and how two such moments belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_light.measure.cost import Cost, count_params
from lightning_light.measure.isolation import isolated
from lightning_light.measure.layer_table import LayerRow, effective_macs, layer_table, layer_weights, matrices
from lightning_light.measure.size import tensor_bytes
from lightning_light.measure.sparsity import zero_fraction

__all__ = ["Snapshot", "matrix_layers", "row_bytes", "structure", "take_snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """A model at one moment.

    Attributes:
        rows: one a layer, in the model's order.
        params: elements of all parameters, shared ones once.
        macs: multiply-accumulates of one forward pass; None if the model was not run.
        bytes: of all parameters and of the buffers that a checkpoint keeps.
        zeros: share of zeros among all weights of two or more axes, in [0, 1].
        bits: mean width of a weight.
        facts: layer -> quantity -> what a method knows of it, as `layer_stats` gives it.
        deflated: bytes after lossless compression; None if that was not measured.
    """

    rows: tuple[LayerRow, ...]
    params: int
    macs: int | None
    bytes: int
    zeros: float
    bits: float
    facts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    deflated: int | None = None

    @property
    def dead_filters(self) -> int:
        """Outputs that have no weight left, of all layers."""
        return sum(row.dead for row in self.rows)

    @property
    def effective_macs(self) -> int | None:
        """Multiply-accumulates whose weight is not zero; None if the model was not run."""
        return None if self.macs is None else effective_macs(self.rows)

    def plain(self) -> dict[str, Any]:
        """In plain types, for a checkpoint."""
        facts = {name: dict(numbers) for name, numbers in self.facts.items()}
        return {**vars(self), "rows": [list(astuple(row)) for row in self.rows], "facts": facts}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Snapshot:
        """What `plain` gave."""
        return cls(**{**plain, "rows": tuple(LayerRow(*row) for row in plain["rows"])})

    def with_zeros_of(self, earlier: Snapshot) -> Snapshot:
        """The same model with the zeros that it had at an ``earlier`` moment."""
        had = {row.name: row for row in earlier.rows}
        rows = (
            replace(row, zeros=had[row.name].zeros, dead=had[row.name].dead) if row.name in had else row
            for row in self.rows
        )
        return replace(self, rows=tuple(rows), zeros=earlier.zeros)


def take_snapshot(
    model: nn.Module, cost: Cost | None = None, facts: Mapping[str, Mapping[str, float]] | None = None
) -> Snapshot:
    """Look at ``model`` as it is now, and leave it as it is.

    Args:
        model: on any device, in any mode.
        cost: from `count_cost` on a model of the same structure; without it nothing is known of MACs.
        facts: what methods know of its layers.

    Example:
        >>> from lightning_light.measure import count_cost
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> snapshot = take_snapshot(model, count_cost(model, (torch.zeros(1, 4),)))
        >>> snapshot.params, snapshot.macs, snapshot.bytes
        (58, 48, 232)
    """
    known = cost or count_params(model)
    with isolated(model):  # a parametrization may otherwise move on when its weight is read
        rows = layer_table(model, _with_parametrized(model, known))
        zeros = zero_fraction(matrices(model))
        weights = dict.fromkeys(weight for module in model.modules() for weight in layer_weights(module))
        elements = sum(weight.numel() for weight in weights)
        bits = sum(8 * weight.element_size() * weight.numel() for weight in weights)
    return Snapshot(
        rows=tuple(_folded(rows)),
        params=known.params,
        macs=None if cost is None else cost.macs,
        bytes=tensor_bytes(model),
        zeros=zeros,
        bits=bits / elements if elements else 0.0,
        facts=facts or {},
    )


def matrix_layers(model: nn.Module) -> list[str]:
    """Names of the layers that multiply: with a weight of two or more axes, so no norms."""
    with isolated(model):
        return [
            name for name, module in model.named_modules() if any(weight.ndim > 1 for weight in layer_weights(module))
        ]


def structure(model: nn.Module) -> int:
    """A number that changes when a module, a shape or a number format does; weights alone do not change it.

    Equal within one process only.
    """
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    tensors = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in model.named_parameters())
    return hash((modules, tensors))


def row_bytes(row: LayerRow) -> int:
    """Bytes of a layer's own parameters, by the width of its weights."""
    return round(row.params * row.bits / 8)


def _with_parametrized(model: nn.Module, cost: Cost) -> Cost:
    """``cost`` with an entry for every parametrized layer, even one that holds nothing of its own any more."""
    layers = {name: 0 for name, module in model.named_modules() if parametrize.is_parametrized(module)}
    return replace(cost, params_by_module=layers | cost.params_by_module)


def _folded(rows: list[LayerRow]) -> list[LayerRow]:
    """A parametrized layer is one layer: what its parametrizations hold is counted as its own."""
    folded: dict[str, LayerRow] = {}
    for row in rows:
        owner = row.name.partition(".parametrizations.")[0]
        if owner in folded:
            first = folded[owner]
            folded[owner] = replace(first, params=first.params + row.params, macs=first.macs + row.macs)
        else:
            folded[owner] = replace(row, type=row.type.removeprefix("Parametrized"))
    return list(folded.values())
