"""Do what a plan says: modules, optimizers and averaged copies follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lightning_light.lowrank.attention import followers, open_module
from lightning_light.lowrank.build import OPERATION, build_factors, close_fast_paths, dense_weight, factor_form
from lightning_light.lowrank.plan import Plan
from lightning_light.lowrank.spectra import MatrixSpectrum, TuckerSpectrum, decompose
from lightning_light.surgery.replace import replace_modules

__all__ = ["apply_factors", "balance_factors"]


def apply_factors(
    model: nn.Module, plan: Plan, *, optimizers: Iterable[Any] = (), averaged_models: Sequence[nn.Module] = ()
) -> dict[str, Any]:
    """Put the factors of ``plan`` into ``model``, in place.

    Args:
        model: the root.
        plan: made on this model as it is.
        optimizers: the factors' weights take the old weight's place in its group; biases keep their state.
        averaged_models: averaged copies of ``model``.

    Returns:
        The edit log's entry.
    """
    optimizers = list(optimizers)
    _open(model, plan, optimizers=optimizers, averaged_models=averaged_models)
    factors: dict[str, nn.Module] = {}
    weights: dict[nn.Parameter, list[nn.Parameter]] = {}
    for name, found in plan.layers.items():
        old = model.get_submodule(name)
        new = build_factors(old, found.form, found.ranks, found.factors)
        factors[name] = new
        weights |= _weights_of(old, new)
    replace_modules(model, factors, optimizers=optimizers, parameters=weights, averaged_models=averaged_models)
    for root in (model, *averaged_models):
        close_fast_paths(root, factors)
    return {
        "op": OPERATION,
        "opened": [[name, blocks] for name, blocks in _owners(plan).items()],
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


def _owners(plan: Plan) -> dict[str, int]:
    return {found.owner: found.blocks for found in plan.layers.values() if found.owner}


def _open(model: nn.Module, plan: Plan, *, optimizers: Iterable[Any], averaged_models: Sequence[nn.Module]) -> None:
    """Attentions and fused layers become several layers each, some of which are then factored."""
    opened: dict[str, nn.Module] = {}
    parameters: dict[nn.Parameter, list[nn.Parameter]] = {}
    for name, blocks in _owners(plan).items():
        old = model.get_submodule(name)
        opened[name] = open_module(old, blocks)
        parameters |= followers(old, opened[name])
    if opened:
        replace_modules(model, opened, optimizers=optimizers, parameters=parameters, averaged_models=averaged_models)


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
