"""Replace modules of a live model, under all their names; the optimizers follow."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_light.errors import SurgeryError, UnsupportedError
from lightning_light.order import Stage
from lightning_light.surgery.attachment import check_owners
from lightning_light.surgery.optimizer import replace_parameters, unwrap

_SHARED_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def replace_modules(
    model: nn.Module,
    replacements: Mapping[str, nn.Module],
    *,
    optimizers: Iterable[Any] = (),
    parameters: Mapping[nn.Parameter, Sequence[nn.Parameter]] | None = None,
    averaged_models: Sequence[nn.Module] = (),
    method: str = "replace_modules",
    stage: int = Stage.FACTORS,
) -> None:
    """Replace several modules at once. Everything is checked before anything changes.

    A new module takes over the training mode and the forward hooks. Parameter objects that it shares with the old one
    (a bias) keep their optimizer state; in an averaged copy they keep their average.

    Args:
        model: the root, changed in place.
        replacements: path of a module -> what takes its place, on the right device and of the right type. A module
            that is used under several names is replaced under all of them; none may lie inside another.
        optimizers: torch optimizers, or Lightning's wrappers.
        parameters: for each parameter of the old modules that the new ones do not have: what takes its place in the
            optimizers, possibly nothing. A parameter that stays may be followed by itself and new ones.
        averaged_models: averaged copies of ``model``, which get copies of the new modules.
        method: the method that replaces.
        stage: its stage.

    Raises:
        SurgeryError: a module or its averaged counterpart does not exist, is parametrized, or a parameter would be left
            in the optimizers without an owner, or in the model without an optimizer.
        UnsupportedError: a later method owns one of the modules.
    """
    optimizers = [unwrap(optimizer) for optimizer in optimizers]
    parameters = parameters or {}
    pairs = _pairs(model, replacements)
    check_owners(model, replacements, method=method, stage=stage, replaces=True)
    _check_parameters(model, pairs, parameters, optimizers)
    counterparts = [_counterparts(averaged_model, pairs) for averaged_model in averaged_models]
    _put(model, pairs)
    for averaged_model, copies in zip(averaged_models, counterparts, strict=True):
        _put(averaged_model, copies)
    names = {parameter: path for path, parameter in model.named_parameters()}
    replace_parameters(optimizers, parameters, names)


def put_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replay the replacement of a module on a structure: only the tree of modules changes.

    Raises:
        SurgeryError: there is no module of that name.
    """
    _put(model, _pairs(model, {name: new}))


def replaced_layer(model: nn.Module, name: str) -> Any:
    """Return the layer of a structure that a replay replaces.

    Raises:
        UnsupportedError: it has no shape before the first forward pass.
    """
    layer = model.get_submodule(name)
    if any(map(is_lazy, layer.parameters())):
        raise UnsupportedError(
            f"A checkpoint in which `{name}` of `{type(model).__name__}` is replaced: expected a layer whose shape is "
            f"known, found a `{type(layer).__name__}` before its first call. Call the module on a batch before loading."
        )
    return layer


Pairs = dict[str, tuple[nn.Module, nn.Module]]
"""Name -> the old module and the new one."""


def _pairs(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Pairs:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    for name in replacements:
        if not name or name not in modules:
            raise SurgeryError(
                f"`replace_modules({{{name!r}: ...}})`: expected the name of a module inside `{type(model).__name__}`, "
                "found none. See `named_modules()`."
            )
        if parametrize.is_parametrized(modules[name]):
            raise SurgeryError(
                f"`replace_modules({{{name!r}: ...}})`: expected a plain module, found one whose tensors are computed "
                "by a parametrization. Remove that first (`torch.nn.utils.parametrize.remove_parametrizations`)."
            )
    return {name: (modules[name], new) for name, new in replacements.items()}


def _check_parameters(
    model: nn.Module, pairs: Pairs, parameters: Mapping[nn.Parameter, Sequence[nn.Parameter]], optimizers: Sequence[Any]
) -> None:
    inside = {id(module) for old, _ in pairs.values() for module in old.modules()}
    elsewhere = {id(p) for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)}
    staying = elsewhere | {id(parameter) for _, new in pairs.values() for parameter in new.parameters()}
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    arriving = {id(parameter) for followers in parameters.values() for parameter in followers}
    for name, (old, new) in pairs.items():
        for path, parameter in old.named_parameters():
            stays = any(follower is parameter for follower in parameters.get(parameter, ()))
            if parameter in parameters and id(parameter) in staying and not stays:
                raise SurgeryError(
                    f"`{name}.{path}` is used elsewhere in the model too, so nothing may take its place."
                )
            if id(parameter) in owned and parameter not in parameters and id(parameter) not in staying:
                raise SurgeryError(
                    f"`{name}.{path}` would stay in the optimizer without an owner: expected it in `parameters`, with "
                    "what takes its place, or an empty list."
                )
        for path, parameter in new.named_parameters():
            if optimizers and parameter.requires_grad and id(parameter) not in owned | arriving:
                raise SurgeryError(
                    f"`{path}` of the new `{name}` would never be trained: expected it in `parameters`, as a follower "
                    "of an old parameter, or without `requires_grad`."
                )


def _put(model: nn.Module, pairs: Pairs) -> None:
    followers = {}
    for old, new in pairs.values():
        new.train(old.training)
        inside = any(module is old for module in new.modules())  # then it keeps its hooks itself
        for kind in _SHARED_HOOKS:
            if not inside and not getattr(new, kind):
                vars(new)[kind] = getattr(old, kind)  # the same dict: whoever holds a handle can still remove it
        followers[id(old)] = new
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in followers:
                parent._modules[key] = followers[id(child)]


def _counterparts(averaged_model: nn.Module, pairs: Pairs) -> Pairs:
    found = _pairs(averaged_model, {name: new for name, (_, new) in pairs.items()})
    return {
        name: (counterpart, _copy_with_averages(new, pairs[name][0], counterpart))
        for name, (counterpart, new) in found.items()
    }


def _copy_with_averages(new: nn.Module, old: nn.Module, counterpart: nn.Module) -> nn.Module:
    averages = dict(counterpart.named_parameters())
    memo: dict[int, Any] = {id(p): averages[path] for path, p in old.named_parameters() if path in averages}
    reference = next(iter(averages.values()), None)
    copied = copy.deepcopy(new, memo)
    return copied if reference is None else copied.to(reference.device)
