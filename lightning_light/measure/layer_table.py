"""Tabulate the cost, sparsity and bit width of a model, with one row per layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_light.measure.cost import Cost
from lightning_light.measure.sparsity import dead_filters, zero_fraction
from lightning_light.validation import validated

__all__ = ["LayerRow", "effective_macs", "layer_table", "layer_weights", "weight_matrices"]

# attributes of torch.nn's layers that state their numbers of input and output channels
_WIDTHS = (
    ("in_channels", "out_channels"),
    ("in_features", "out_features"),
    ("in1_features", "out_features"),
    ("input_size", "hidden_size"),
    ("num_features", "num_features"),
    ("num_channels", "num_channels"),
    ("embed_dim", "embed_dim"),
    ("num_embeddings", "embedding_dim"),
    ("num_parameters", "num_parameters"),
)


@dataclass(frozen=True)
class LayerRow:
    """The cost of one layer.

    Attributes:
        name: path in the model; empty for the model itself.
        type: class name.
        channels_in: number of input channels; None where the layer does not state it.
        channels_out: number of output channels; None where the layer does not state it.
        params: elements of the layer's own parameters.
        macs: MACs that ran in the layer itself.
        sparsity: fraction of its weights (not biases) that is zero, in [0, 1].
        bits: mean bit width of its weights: of their data type, or of their fake quantization.
        dead_filters: outputs whose weights are all zero.
        bytes: of the layer's own parameters, as they are stored.
    """

    name: str
    type: str
    channels_in: int | None
    channels_out: int | None
    params: int
    macs: int
    sparsity: float
    bits: float
    dead_filters: int = 0
    bytes: int = 0


@validated
def layer_table(model: nn.Module, cost: Cost) -> list[LayerRow]:
    """Return a row for each module that has parameters of its own or MACs, in the model's order.

    Parameters and MACs of parametrizations count for the layer.

    Args:
        model: any module.
        cost: from `count_cost` on the same model.

    Example:
        >>> import torch
        >>> from lightning_light.measure.cost import count_cost
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> for row in layer_table(model, count_cost(model, (torch.zeros(1, 4),))):
        ...     (row.name, row.type, row.channels_in, row.channels_out, row.params, row.macs, row.bits)
        ('0', 'Linear', 4, 8, 40, 32, 32.0)
        ('2', 'Linear', 8, 2, 18, 16, 32.0)
    """
    macs, params = _by_layer(cost.macs_by_module), _by_layer(cost.params_by_module)
    return [
        _row(name, module, macs.get(name, 0), params.get(name, 0))
        for name, module in model.named_modules()
        if name in macs or name in params
    ]


def _by_layer(counts: dict[str, int]) -> dict[str, int]:
    merged: dict[str, int] = {}
    for name, count in counts.items():
        layer = "" if name.startswith("parametrizations.") else name.partition(".parametrizations.")[0]
        merged[layer] = merged.get(layer, 0) + count
    return merged


def _row(name: str, module: nn.Module, macs: int, params: int) -> LayerRow:
    channels_in, channels_out = _widths(module)
    weights = _weights(module)
    elements = sum(weight.numel() for weight in weights)
    bits = sum(8 * weight.element_size() * weight.numel() for weight in weights)
    return LayerRow(
        name=name,
        type=type(module).__name__,
        channels_in=channels_in,
        channels_out=channels_out,
        params=params,
        macs=macs,
        sparsity=zero_fraction(weights),
        bits=bits / elements if elements else 0.0,
        dead_filters=dead_filters(module, weights),
        bytes=sum(own.numel() * own.element_size() for own in module.parameters(recurse=False)),
    )


def _widths(module: nn.Module) -> tuple[int | None, int | None]:
    for names in _WIDTHS:
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(width, int) for width in found):
            return found[0], found[1]
    if isinstance(module, nn.LayerNorm) and module.normalized_shape:
        return module.normalized_shape[-1], module.normalized_shape[-1]
    return None, None


def _weights(module: nn.Module) -> list[Tensor]:
    """Return the layer's own weights; biases only if it has no weights."""
    return [weight.detach() for weight in layer_weights(module) or module.parameters(recurse=False)]


def layer_weights(module: nn.Module) -> list[Tensor]:
    """Return the weights that ``module`` itself computes with: parametrized ones as computed, without biases.

    Call it inside `isolated`, without gradients and in evaluation mode.
    """
    if isinstance(module, parametrize.ParametrizationList):
        return []  # its originals count as the weight that is computed from them
    own = dict(module.named_parameters(recurse=False))
    if parametrize.is_parametrized(module):
        own |= {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]  # a ModuleDict
    return [weight for name, weight in own.items() if "bias" not in name]


def weight_matrices(model: nn.Module) -> Iterator[Tensor]:
    """Yield every weight of two or more dimensions that ``model`` computes with; shared ones once."""
    weights = dict.fromkeys(weight for module in model.modules() for weight in layer_weights(module))
    return (weight for weight in weights if weight.ndim > 1)


def effective_macs(rows: Iterable[LayerRow]) -> int:
    """Count the MACs whose weight is nonzero. Only kernels that skip zeros save the others."""
    return round(sum(row.macs * (1.0 - row.sparsity) for row in rows))
