"""Do what a plan says: modules, optimizers and averaged copies follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lightning_light.lowrank.attention import followers, open_module
from lightning_light.lowrank.build import OPERATION, build_factors, close_fast_paths, dense_weight, factor_form
from lightning_light.lowrank.plan import Plan
from lightning_light.lowrank.spectra import MatrixSpectrum, TuckerSpectrum, decompose
from lightning_light.surgery.replace import replace_module

__all__ = ["apply_factors", "balance_factors"]


def apply_factors(
    model: nn.Module, plan: Plan, *, optimizers: Iterable[Any] = (), mirrors: Sequence[nn.Module] = ()
) -> dict[str, Any]:
    """Put the factors of ``plan`` into ``model``, in place.

    Args:
        model: the root.
        plan: made on this model as it is.
        optimizers: the factors' weights take the old weight's place in its group; biases keep their state.
        mirrors: averaged copies of ``model``.

    Returns:
        The journal's entry.
    """
    optimizers = list(optimizers)
    opened = {found.owner: found.blocks for found in plan.layers.values() if found.owner}
    for name, blocks in opened.items():
        old = model.get_submodule(name)
        new = open_module(old, blocks)
        replace_module(model, name, new, op=OPERATION, optimizers=optimizers, parameters=followers(old, new),
                       mirrors=mirrors)  # fmt: skip
    places = _Places(model, optimizers)
    for name, found in plan.layers.items():
        old = model.get_submodule(name)
        factors = build_factors(old, found.form, found.ranks, found.factors)
        roots, inner = places.nearest(name, (model, *mirrors))
        replace_module(roots[0], inner, factors, op=OPERATION, optimizers=optimizers, mirrors=roots[1:],
                       parameters=_weights_of(old, factors))  # fmt: skip
        for root in (model, *mirrors):
            close_fast_paths(root, name)
    return {
        "op": OPERATION,
        "opened": [[name, blocks] for name, blocks in opened.items()],
        "layers": [[name, found.form, list(found.ranks)] for name, found in plan.layers.items()],
    }


def balance_factors(model: nn.Module) -> list[str]:
    """Spread the scale of every factored layer evenly over its factors again; the layer computes the same.

    Training lets one factor grow and the other shrink, which slows it down and spoils quantization. The weights stay
    the same Parameter objects; an optimizer's momentum is of the old scale, so best before a fresh optimizer.

    Args:
        model: changed in place.

    Returns:
        Names of the layers that were balanced.

    Example:
        >>> from lightning_light.lowrank.build import build_factors
        >>> layer = nn.Linear(8, 6, bias=False)
        >>> pair = build_factors(layer, "linear", (6,), [torch.eye(6, 8) * 100.0, layer.weight.detach()[:, :6] / 100.0])
        >>> net = nn.Sequential(pair)
        >>> balance_factors(net), bool((pair[0].weight.norm() / pair[1].weight.norm() - 1).abs() < 1e-3)
        (['0'], True)
    """
    balanced = []
    for name, module in model.named_modules():
        form = factor_form(module)
        if form is not None:
            layers: list[Any] = list(module.children())
            spectrum = decompose(form, dense_weight(module))
            assert isinstance(spectrum, (MatrixSpectrum, TuckerSpectrum))
            ranks = _ranks(form, layers)
            for layer, factor in zip(layers, spectrum.factors(ranks), strict=True):
                layer.weight.data.copy_(factor.reshape(layer.weight.shape))
            balanced.append(name)
    return balanced


def _ranks(form: str, layers: list[Any]) -> tuple[int, ...]:
    if form == "embedding":
        return (layers[0].embedding_dim,)
    groups = getattr(layers[0], "groups", 1)
    return tuple(layer.weight.shape[0] // groups for layer in layers[:-1])


def _weights_of(old: nn.Module, factors: nn.Sequential) -> dict[nn.Parameter, list[nn.Parameter]]:
    new: list[Any] = [layer.weight for layer in factors]
    if factor_form(old) is None:
        weight: Any = old.weight
        return {weight: new}
    layers: list[Any] = list(old.children())
    return {layer.weight: [weight] for layer, weight in zip(layers, new, strict=True)}


class _Places:
    """From where a layer may be replaced: its parent, where nothing outside it refers to the layer.

    Walking the whole network for each layer takes longer than the decompositions do. A plan has no layer whose weights
    another one shares, so only a layer with several names, and optimizers that know names, need the root.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        names: dict[int, int] = {}
        for _, module in model.named_modules(remove_duplicate=False):
            names[id(module)] = names.get(id(module), 0) + 1
        self._model, self._names = model, names
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._by_name = any("param_names" in group for group in groups)

    def nearest(self, name: str, roots: Sequence[nn.Module]) -> tuple[list[nn.Module], str]:
        """The root for each of ``roots``, and the layer's name from there."""
        parent, _, leaf = name.rpartition(".")
        alone = self._names.get(id(self._model.get_submodule(name)), 1) == 1
        if not alone or self._by_name:
            return list(roots), name
        return [root.get_submodule(parent) for root in roots], leaf
