"""One row a layer: what a table before and after compression is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_light.measure.cost import Cost
from lightning_light.measure.sparsity import dead_outputs, zero_fraction

__all__ = ["LayerRow", "effective_macs", "layer_table", "layer_weights", "matrices"]

# attributes of torch.nn's layers that say how many channels go in and come out
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
    """What one layer is and costs.

    Attributes:
        name: its path in the model; empty for the model itself.
        type: its class name.
        channels_in: None where the layer does not say.
        channels_out: None where the layer does not say.
        params: elements of its own parameters.
        macs: multiply-accumulates that ran in the layer itself.
        zeros: share of zeros among its weights (biases are left out), in [0, 1].
        bits: mean width of a weight's data type; a method that stores fewer bits replaces it.
        dead: outputs that have no weight left.
    """

    name: str
    type: str
    channels_in: int | None
    channels_out: int | None
    params: int
    macs: int
    zeros: float
    bits: float
    dead: int = 0


def layer_table(model: nn.Module, cost: Cost) -> list[LayerRow]:
    """A row for each module that holds parameters of its own or in which products ran, in the model's order.

    What the parametrizations of a layer hold and cost counts for the layer.

    Args:
        model: as it is now.
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
    folded: dict[str, int] = {}
    for name, count in counts.items():
        layer = "" if name.startswith("parametrizations.") else name.partition(".parametrizations.")[0]
        folded[layer] = folded.get(layer, 0) + count
    return folded


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
        zeros=zero_fraction(weights),
        bits=bits / elements if elements else 0.0,
        dead=dead_outputs(module, weights),
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
    """The layer's own weights; biases only if there is nothing else."""
    return [weight.detach() for weight in layer_weights(module) or module.parameters(recurse=False)]


def layer_weights(module: nn.Module) -> list[Tensor]:
    """The weights that ``module`` itself computes with: through parametrizations, without biases.

    Read them inside `isolated`: without gradients, and in evaluation mode.
    """
    if isinstance(module, parametrize.ParametrizationList):
        return []  # its originals are counted as the weight that they make
    own = dict(module.named_parameters(recurse=False))
    if parametrize.is_parametrized(module):
        own |= {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]  # a ModuleDict
    return [weight for name, weight in own.items() if "bias" not in name]


def matrices(model: nn.Module) -> Iterator[Tensor]:
    """Every weight of two or more axes that ``model`` computes with, shared ones once."""
    weights = dict.fromkeys(weight for module in model.modules() for weight in layer_weights(module))
    return (weight for weight in weights if weight.ndim > 1)


def effective_macs(rows: Iterable[LayerRow]) -> int:
    """Multiply-accumulates whose weight is not zero. Only a kernel that skips zeros saves the others."""
    return round(sum(row.macs * (1.0 - row.zeros) for row in rows))
