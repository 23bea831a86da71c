"""Read the evidence that a fit needs of every layer from what an `EvidenceCollector` has gathered."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.criteria.gathered import Gathered
from lightning_light.lowrank.factors import factor_form
from lightning_light.lowrank.layers import FactorizableLayer
from lightning_light.lowrank.splitting import split_weights

__all__ = ["first_batches", "layer_evidence", "watched_modules"]

_INPUT_KINDS = ("input_covariance", "input_absolute")
_ATTENTION_INPUTS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


def first_batches(data: Iterable[Any] | None, count: int) -> list[Any]:
    """Return the first ``count`` batches of ``data``; the state of torch's random generator stays as it is."""
    if data is None:
        return []
    with torch.random.fork_rng(devices=[]):
        return list(islice(data, count))


def watched_modules(model: nn.Module, layers: Iterable[FactorizableLayer]) -> list[str]:
    """Name the modules whose inputs and gradients a collector has to watch: of factors, the first one."""
    names = dict.fromkeys(layer.owner or layer.name for layer in layers)
    return [f"{name}.0" if factor_form(model.get_submodule(name)) else name for name in names]


def layer_evidence(
    model: nn.Module, layers: Iterable[FactorizableLayer], gathered: Gathered
) -> dict[str, dict[str, Tensor]]:
    """Return layer name -> kind -> evidence of its matrix, ``(groups, ..., in)``.

    The input of an attention's output projection exists only inside the attention's kernel, so that projection has no
    evidence of its inputs.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for layer in layers:
        module = model.get_submodule(layer.owner or layer.name)
        key = _input_key(layer, module)
        pieces = {kind: gathered.get(kind, key) for kind in _INPUT_KINDS} if key else {}
        pieces["grad_squared"] = _squared_gradients(layer, module, gathered)
        known = {kind: piece for kind, piece in pieces.items() if piece is not None}
        if known:
            found[layer.name] = known
    return found


def _input_key(layer: FactorizableLayer, module: nn.Module) -> str | None:
    """Return the collector's name for the input of a layer, or None where it cannot be read."""
    if isinstance(module, nn.MultiheadAttention):
        projection = layer.name.removeprefix(f"{layer.owner}.").partition(".")[0]
        argument = _ATTENTION_INPUTS.get(projection)
        return None if argument is None else f"{layer.owner}:{argument}"
    return layer.owner or (f"{layer.name}.0" if factor_form(module) else layer.name)


def _squared_gradients(layer: FactorizableLayer, module: nn.Module, gathered: Gathered) -> Tensor | None:
    """Return the squared gradients of a matrix, summed over its outputs: ``(groups, 1, in)``."""
    if not layer.owner:
        squares = None if factor_form(module) else gathered.get("grad_squared", f"{layer.name}.weight")
        groups = layer.weight.shape[0]
        return None if squares is None else squares.reshape(groups, len(squares) // groups, -1).sum(1, keepdim=True)
    inner = split_weights(module, layer.parts)[layer.name.removeprefix(f"{layer.owner}.")]
    for name, parameter in module.named_parameters():
        squares = gathered.get("grad_squared", f"{layer.owner}.{name}")
        if squares is not None and inner.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
            first = (inner.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            return squares[first : first + len(inner)].sum(0, keepdim=True)[None]
    return None
