"""One module takes another's place, under all its names, and the optimizers follow."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_light.errors import SurgeryError
from lightning_light.surgery.optimizer import replace_parameters, unwrap

_SHARED_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def replace_module(
    model: nn.Module,
    name: str,
    new: nn.Module,
    *,
    op: str,
    optimizers: Iterable[Any] = (),
    parameters: Mapping[nn.Parameter, Sequence[nn.Parameter]] | None = None,
    mirrors: Sequence[nn.Module] = (),
    **details: Any,
) -> dict[str, Any]:
    """Put ``new`` where ``name`` is. Everything is checked before anything changes.

    ``new`` takes over the training mode and the forward hooks. Parameter objects that it shares with the old module
    (a bias) keep their optimizer state; in an averaged copy they keep their average.

    Args:
        model: the root, changed in place.
        name: the module's path; one that is used under several names is replaced under all of them.
        new: what takes its place, on the right device and of the right type.
        op: name of the registered operation that replays this, for the journal.
        optimizers: torch optimizers, or Lightning's wrappers.
        parameters: for each parameter of the old module that ``new`` does not have: what takes its place in the
            optimizers, possibly nothing.
        mirrors: averaged copies of ``model``, which get a copy of ``new``.
        **details: what else the replay needs, in plain types.

    Returns:
        The journal's entry: ``{"op": op, "name": name, **details}``.

    Raises:
        SurgeryError: the module or a mirror's counterpart does not exist, is parametrized, or a parameter would be
            left in the optimizers without an owner, or in the model without an optimizer.
    """
    optimizers = [unwrap(optimizer) for optimizer in optimizers]
    old = _find(model, name)
    parameters = parameters or {}
    _check_parameters(model, old, new, parameters, optimizers, name)
    counterparts = [_find(mirror, name) for mirror in mirrors]
    copies = [_copy_with_averages(new, old, counterpart) for counterpart in counterparts]
    _put(model, old, new)
    for mirror, counterpart, twin in zip(mirrors, counterparts, copies, strict=True):
        _put(mirror, counterpart, twin)
    names = {parameter: path for path, parameter in model.named_parameters()}
    replace_parameters(optimizers, parameters, names)
    return {"op": op, "name": name, **details}


def put_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """The replay of `replace_module`: only the tree changes.

    Raises:
        SurgeryError: there is no module of that name.
    """
    _put(model, _find(model, name), new)


def _find(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        raise SurgeryError(
            f"`replace_module(name={name!r})`: expected the name of a module inside `{type(model).__name__}`, found "
            "none. See `named_modules()`."
        )
    found = modules[name]
    if parametrize.is_parametrized(found):
        raise SurgeryError(
            f"`replace_module(name={name!r})`: expected a plain module, found one whose tensors are computed by a "
            "parametrization. Remove that first (`torch.nn.utils.parametrize.remove_parametrizations`)."
        )
    return found


def _check_parameters(
    model: nn.Module,
    old: nn.Module,
    new: nn.Module,
    parameters: Mapping[nn.Parameter, Sequence[nn.Parameter]],
    optimizers: Sequence[Any],
    name: str,
) -> None:
    inside = {id(module) for module in old.modules()}
    elsewhere = {id(p) for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)}
    staying = elsewhere | {id(parameter) for parameter in new.parameters()}
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for path, parameter in old.named_parameters():
        if parameter in parameters and id(parameter) in staying:
            raise SurgeryError(f"`{name}.{path}` is used elsewhere in the model too, so nothing may take its place.")
        if id(parameter) in owned and parameter not in parameters and id(parameter) not in staying:
            raise SurgeryError(
                f"`{name}.{path}` would stay in the optimizer without an owner: expected it in `parameters`, with what "
                "takes its place, or an empty list."
            )
    arriving = {id(parameter) for followers in parameters.values() for parameter in followers}
    for path, parameter in new.named_parameters():
        if optimizers and parameter.requires_grad and id(parameter) not in owned | arriving:
            raise SurgeryError(
                f"`{path}` of the new `{name}` would never be trained: expected it in `parameters`, as a follower of "
                "an old parameter, or without `requires_grad`."
            )


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    inside = any(module is old for module in new.modules())  # then it keeps its hooks itself
    for kind in _SHARED_HOOKS:
        if not inside and not getattr(new, kind):
            vars(new)[kind] = getattr(old, kind)  # the same dict, so that whoever holds a handle can still remove it
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[key] = new


def _copy_with_averages(new: nn.Module, old: nn.Module, counterpart: nn.Module) -> nn.Module:
    averages = dict(counterpart.named_parameters())
    memo: dict[int, Any] = {id(p): averages[path] for path, p in old.named_parameters() if path in averages}
    reference = next(iter(averages.values()), None)
    twin = copy.deepcopy(new, memo)
    return twin if reference is None else twin.to(reference.device)
