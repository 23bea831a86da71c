"""Let optimizer state follow its parameters: it is cut with them, or dropped with them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_light.errors import SurgeryError, UnsupportedError
from lightning_light.host.classes import is_host
from lightning_light.surgery.data import in_layout_of

_MOMENTS = ("exp_avg", "exp_avg_sq", "exp_inf", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg")
"""State of torch's elementwise optimizers, of the parameter's shape."""

# For each dimension of a state tensor: the parameter's dimension that it follows, or None where it is broadcast.
Layout = tuple[int | None, ...]


def unwrap(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside Lightning's ``LightningOptimizer``, or ``optimizer`` itself."""
    return cast(Optimizer, optimizer.optimizer if is_host(optimizer, "LightningOptimizer") else optimizer)


def check_optimizers(optimizers: Iterable[Any]) -> None:
    """Refuse, before anything is trained, optimizers whose state belongs to no single parameter.

    Raises:
        UnsupportedError: an ``LBFGS``: it keeps one flat history of all parameters under the first one.
    """
    for optimizer in map(unwrap, optimizers):
        if isinstance(optimizer, LBFGS):
            raise UnsupportedError(
                "`LBFGS` keeps one flat history of all parameters, which cannot follow a change of shape: expected an "
                "optimizer with state per parameter, such as `SGD` or `AdamW`. Train with one of those while the "
                "network is compressed, and use `LBFGS` afterwards."
            )


def check_sliceable(optimizer: Any, parameter: Tensor, old_shape: Sequence[int]) -> None:
    """Refuse, before anything is changed, state of ``parameter`` that cannot be cut along with it.

    Args:
        optimizer: a torch optimizer, or Lightning's wrapper around one.
        parameter: the parameter that is about to change shape.
        old_shape: its shape before the change, which the state was made for.

    Raises:
        UnsupportedError: the state has an entry whose relation to the parameter's dimensions is unknown.
    """
    optimizer = unwrap(optimizer)
    check_optimizers([optimizer])
    for key, value in optimizer.state.get(parameter, {}).items():
        if _follows(key, value, tuple(old_shape)):
            _layout(optimizer, key, value, tuple(old_shape))


def slice_state(optimizer: Any, parameter: Tensor, old_shape: Sequence[int], gather: Mapping[int, Tensor]) -> None:
    """Keep of every state tensor of ``parameter`` what ``gather`` keeps of the parameter.

    The sliced state is the one that the small network would have had if the removed channels had always been zero,
    for every optimizer whose update is elementwise (SGD, Adam, RMSprop, Lion, ...). Factored second moments
    (Adafactor) are sliced consistently, but are means over rows that included what is gone.

    Args:
        optimizer: a torch optimizer, or Lightning's wrapper around one; one without state for it is left alone.
        parameter: the parameter, before or after its data were cut.
        old_shape: its shape before the cut.
        gather: dimension of the parameter -> ascending positions that stay; a dimension left out stays whole.
    """
    optimizer = unwrap(optimizer)
    state = optimizer.state.get(parameter)
    if not state:
        return
    sliced = {
        key: _select(value, _layout(optimizer, key, value, tuple(old_shape)), gather)
        for key, value in state.items()
        if _follows(key, value, tuple(old_shape))
    }
    state.update(sliced)  # in one go: a refusal above leaves the old state whole


def replace_parameters(
    optimizers: Iterable[Any],
    replacements: Mapping[nn.Parameter, Sequence[nn.Parameter]],
    names: Mapping[nn.Parameter, str] | None = None,
) -> int:
    """Replace parameters in optimizers: same group, same position, no state yet.

    The group sets learning rate and weight decay, and checkpoints are checked against the number of groups. The old
    state is dropped: the new tensors have another scale.

    Args:
        optimizers: torch optimizers, or Lightning's wrappers.
        replacements: old parameter -> what takes its place, possibly nothing; if it is among them, its state is kept.
        names: for optimizers made from ``named_parameters()``, the names of the new ones.

    Returns:
        The number of entries that were replaced.
    """
    filled = 0
    for optimizer in map(unwrap, optimizers):
        for group in optimizer.param_groups:
            filled += _replace_in_group(group, replacements, names or {})
        for old, followers in replacements.items():
            if not any(follower is old for follower in followers):
                optimizer.state.pop(old, None)
    return filled


def parameter_order(optimizers: Iterable[Any], model: nn.Module) -> list[list[list[str | None]]]:
    """Return the names of the parameters by optimizer and group, in order; None for one that is not the model's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
        for optimizer in map(unwrap, optimizers)
    ]


def order_parameters(optimizers: Sequence[Any], model: nn.Module, order: list[list[list[str | None]]]) -> int:
    """Give every group the parameters that ``order`` names, so that state stored by position belongs to them.

    Args:
        optimizers: those of this run, whose state is not loaded yet.
        model: the live module, whose parameters may be other objects than those the optimizers were made with.
        order: `parameter_order` of the run that wrote the checkpoint.

    Returns:
        The number of entries that were replaced. Where optimizers or groups differ in number, Lightning raises.

    Raises:
        SurgeryError: ``order`` names a parameter that the model does not have.
    """
    groups = [group for optimizer in map(unwrap, optimizers) for group in optimizer.param_groups]
    wanted = [names for optimizer in order for names in optimizer]
    if [len(unwrap(optimizer).param_groups) for optimizer in optimizers] != [len(optimizer) for optimizer in order]:
        return 0
    parameters = dict(model.named_parameters())
    missing = sorted({name for names in wanted for name in names if name is not None} - parameters.keys())
    if missing:
        raise SurgeryError(
            f"The optimizers of the checkpoint own {missing[:5]}, which `{type(model).__name__}` does not have."
        )
    return sum(_fill_group(group, names, parameters) for group, names in zip(groups, wanted, strict=True))


def owners_of(module: nn.Module, optimizers: Iterable[Any]) -> list[int]:
    """Return the places of the optimizers that have a parameter of ``module``."""
    ours = {id(parameter) for parameter in module.parameters()}
    return [place for place, one in enumerate(optimizers) if any(id(p) in ours for p in _parameters([one]))]


def adopt(group: dict[str, Any], parameter: nn.Parameter, name: str) -> None:
    """Add a parameter that is not the model's to an optimizer.

    It becomes the last of an existing group: learning rate schedulers would not know a new one. Added in the same order
    before the optimizer's state is loaded, it has its state restored.

    Args:
        group: of the optimizer.
        parameter: new to it.
        name: for optimizers made from ``named_parameters()``.
    """
    group["params"].append(parameter)
    if "param_names" in group:
        group["param_names"].append(name)


def disown(optimizers: Iterable[Any], parameters: Iterable[nn.Parameter]) -> None:
    """Remove parameters and their state from the optimizers that have them."""
    held = {id(parameter): parameter for parameter in parameters}
    for optimizer in map(unwrap, optimizers):
        for group in optimizer.param_groups:
            for place in reversed([place for place, one in enumerate(group["params"]) if id(one) in held]):
                del group["params"][place]
                if "param_names" in group:
                    del group["param_names"][place]
        for parameter in held.values():
            optimizer.state.pop(parameter, None)


def elementwise_state(state: Mapping[str, Any]) -> list[Tensor]:
    """Return the moments in the state of one parameter, which have its shape."""
    return [value for key, value in state.items() if key in _MOMENTS and isinstance(value, Tensor)]


def orphans(optimizers: Iterable[Any], model: nn.Module) -> int:
    """Count the optimizers' parameters that are not the model's."""
    owned = {id(parameter) for parameter in model.parameters()}
    return sum(id(parameter) not in owned for parameter in _parameters(optimizers))


def _parameters(optimizers: Iterable[Any]) -> Iterator[nn.Parameter]:
    for optimizer in map(unwrap, optimizers):
        for group in optimizer.param_groups:
            yield from group["params"]


def _follows(key: str, value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a state entry depends on the parameter's shape (a step count, as a number or tensor, does not)."""
    if torch.is_tensor(value):
        return value.numel() > 1 or tuple(value.shape) == shape
    if value is None or isinstance(value, int | float | bool | str):
        return False
    raise UnsupportedError(
        f"The optimizer keeps `{key}` of type {type(value).__name__} for a parameter of shape {shape}: expected "
        "tensors and numbers, which can follow a change of shape. Use an elementwise optimizer, `SGD` or `AdamW`."
    )


def _layout(optimizer: Optimizer, key: str, value: Tensor, shape: tuple[int, ...]) -> Layout:
    """Which dimension of the parameter each dimension of ``value`` follows."""
    found = tuple(value.shape)
    rank = len(shape)
    if found == shape:
        return tuple(range(rank))
    if len(found) == rank and all(have in (1, of) for have, of in zip(found, shape, strict=True)):
        return tuple(None if have == 1 else dim for dim, have in enumerate(found))  # torch's Adafactor
    without_last = tuple(range(rank - 1))
    without_second_last = (*range(rank - 2), rank - 1)
    fitting = [
        layout
        for layout in (without_last, without_second_last)
        if rank > 1 and found == tuple(shape[d] for d in layout)
    ]  # transformers' Adafactor: means over the last, or the second last dimension
    if len(fitting) == 2:  # the two have one size, and only the name tells which is which
        fitting = [layout for layout, word in zip(fitting, ("row", "col"), strict=True) if word in key]
    if len(fitting) == 1:
        return fitting[0]
    raise UnsupportedError(
        f"`{type(optimizer).__name__}` keeps `{key}` of shape {found} for a parameter of shape {shape}: it is unknown "
        "which channels its entries belong to, so it cannot follow a change of shape. Use an elementwise optimizer "
        "such as `SGD` or `AdamW`."
    )


def _select(value: Tensor, layout: Layout, gather: Mapping[int, Tensor]) -> Tensor:
    sliced = value
    for dim, source in enumerate(layout):
        if source is not None and source in gather:
            sliced = sliced.index_select(dim, gather[source].to(value.device))
    return in_layout_of(value, sliced)


def _replace_in_group(
    group: dict[str, Any],
    replacements: Mapping[nn.Parameter, Sequence[nn.Parameter]],
    names: Mapping[nn.Parameter, str],
) -> int:
    kept_names = group.get("param_names", [""] * len(group["params"]))
    places = [
        [(new, names.get(new, f"{name}.{position}")) for position, new in enumerate(replacements[old])]
        if old in replacements
        else [(old, name)]
        for old, name in zip(group["params"], kept_names, strict=True)
    ]
    filled = sum(old in replacements for old in group["params"])
    group["params"] = [parameter for place in places for parameter, _ in place]
    if "param_names" in group:
        group["param_names"] = [name for place in places for _, name in place]
    return filled


def _fill_group(group: dict[str, Any], names: list[str | None], parameters: Mapping[str, nn.Parameter]) -> int:
    owned = {id(parameter) for parameter in parameters.values()}
    others = iter([parameter for parameter in group["params"] if id(parameter) not in owned])
    wanted = [next(others, None) if name is None else parameters[name] for name in names]
    if any(parameter is None for parameter in wanted):
        return 0  # fewer parameters that are not the model's than before: Lightning's own check reports it
    filled = sum(old is not new for old, new in zip(group["params"], wanted, strict=False))
    group["params"] = wanted
    if "param_names" in group:
        group["param_names"] = [name or "" for name in names]
    return filled
