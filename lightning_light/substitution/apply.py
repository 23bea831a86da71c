"""Put lighter operators into a live model, and replay that on a structure."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from torch import nn

from lightning_light.order import Stage
from lightning_light.substitution.operators import operator_from, plain_operator
from lightning_light.substitution.options import METHOD
from lightning_light.substitution.plan import SubstitutionPlan
from lightning_light.surgery.operations import register_operation
from lightning_light.surgery.replace import put_module, replace_modules, replaced_layer

__all__ = ["apply_operators"]

REPLACE = "substitution/replace"

_replace = partial(replace_modules, method=METHOD, stage=Stage.SUBSTITUTION)


def apply_operators(model: nn.Module, plan: SubstitutionPlan, **followers: Any) -> dict[str, Any]:
    """Put the operators of ``plan`` into ``model``, in place.

    Args:
        model: the live model, of which the plan was made.
        plan: its layers are copied.
        **followers: ``optimizers``, where new weights take the place of the old weight in its parameter group and new
            biases that of the old bias, if there was one, and ``averaged_models``, as in `replace_modules`.

    Returns:
        The edit log's entry.

    Raises:
        SurgeryError: see `replace_modules`; nothing is changed.
        UnsupportedError: a later method owns one of the layers; nothing is changed.
    """
    new: dict[str, nn.Module] = {}
    parameters: dict[nn.Parameter, list[nn.Parameter]] = {}
    for name, layers in plan.layers.items():
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        weight, bias = cast(nn.Parameter, conv.weight), cast("nn.Parameter | None", conv.bias)
        new[name] = placed = copy.deepcopy(layers).to(conv.weight).requires_grad_()
        biases = [p for own, p in placed.named_parameters() if bias is not None and own.endswith("bias")]
        others = [p for p in placed.parameters() if all(p is not own for own in biases)]
        parameters |= {weight: others} if bias is None else {weight: others, bias: biases}
    _replace(model, new, parameters=parameters, **followers)
    operators = {name: plain_operator(operator) for name, operator in plan.operators.items()}
    return {"op": REPLACE, "layers": operators}


@register_operation(REPLACE)
def replay_replacement(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Put the layers of the operators into a structure; their tensors come from the state dict."""
    for name, plain in entry["layers"].items():
        conv = replaced_layer(model, name)
        put_module(model, name, operator_from(plain).build(conv).to(conv.weight.dtype))
