"""Apply a factorization plan: modules, optimizers and averaged models follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn

from lightning_light.lowrank.build import build_factors, current_ranks, dense_weight, disable_fast_paths
from lightning_light.lowrank.factors import Factors, factor_form
from lightning_light.lowrank.plan import FactorizationPlan
from lightning_light.lowrank.spectra import decompose
from lightning_light.lowrank.splitting import replacing_parameters, split_module
from lightning_light.order import Stage
from lightning_light.surgery.attachment import check_owners
from lightning_light.surgery.replace import replace_modules
from lightning_light.validation import validated

__all__ = ["METHOD", "apply_factors", "balance_factors", "check_unowned"]

METHOD = "low_rank"
"""Name of the method in the compression state and in logs."""

_replace = partial(replace_modules, method=METHOD, stage=Stage.FACTORS)


def apply_factors(
    model: nn.Module,
    plan: FactorizationPlan,
    *,
    optimizers: Iterable[Any] = (),
    averaged_models: Sequence[nn.Module] = (),
) -> dict[str, Any]:
    """Put the factors of ``plan`` into ``model``, in place.

    Args:
        model: the root.
        plan: made on this model as it is.
        optimizers: the weights of the factors replace the old weight in its parameter group; biases keep their state.
        averaged_models: averaged copies of ``model``.

    Returns:
        The edit log's entry.

    Raises:
        UnsupportedError: a later method owns one of the layers; nothing is changed.
    """
    check_unowned(model, [layer.owner or name for name, layer in plan.layers.items()])
    optimizers = list(optimizers)
    split: dict[str, nn.Module] = {}
    parameters: dict[nn.Parameter, list[nn.Parameter]] = {}
    for name, parts in plan.entry["split"]:
        old = model.get_submodule(name)
        split[name] = split_module(old, parts)
        parameters |= replacing_parameters(old, split[name])
    _replace(model, split, optimizers=optimizers, parameters=parameters, averaged_models=averaged_models)
    factors: dict[str, nn.Module] = {}
    parameters = {}
    for name, layer in plan.layers.items():
        old = model.get_submodule(name)
        factors[name] = new = build_factors(old, layer.form, layer.ranks, layer.factors)
        parameters |= _replacing_weights(old, new)
    _replace(model, factors, optimizers=optimizers, parameters=parameters, averaged_models=averaged_models)
    for root in (model, *averaged_models):
        disable_fast_paths(root, factors)
    return plan.entry


def check_unowned(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse layers that a later method, such as quantization, works on.

    Raises:
        UnsupportedError: names the layer, its owner, and the right order.
    """
    check_owners(model, layers, method=METHOD, stage=Stage.FACTORS, replaces=True)


@validated
def balance_factors(model: nn.Module) -> list[str]:
    """Distribute the scale of every factorized layer evenly over its factors; the layer computes the same.

    In training one factor grows and the other shrinks, which slows training down and harms quantization. The weights
    stay the same Parameter objects. The momentum of an optimizer has the old scale, so balance before making a new one.

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
            factors = decompose(form, dense_weight(module)).factors(current_ranks(module))
            for layer, factor in zip(layers, factors, strict=True):
                layer.weight.data.copy_(factor.reshape(layer.weight.shape))
            balanced.append(name)
    return balanced


def _replacing_weights(old: nn.Module, factors: Factors) -> dict[nn.Parameter, list[nn.Parameter]]:
    new: list[Any] = [layer.weight for layer in factors]
    if factor_form(old) is None:
        weight: Any = old.weight
        return {weight: new}
    layers: list[Any] = list(old.children())
    return {layer.weight: [weight] for layer, weight in zip(layers, new, strict=True)}
