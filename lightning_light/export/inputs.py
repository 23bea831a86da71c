"""Calls of a network: their batches, and their tensors by position, as runtimes take them."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.errors import TraceError
from lightning_light.example_input import ExampleInput
from lightning_light.nested import map_tensors, named_leaves, tensors_in

__all__ = [
    "Positional",
    "altered",
    "batch_size",
    "cloned",
    "first_sample",
    "first_samples",
    "has_tensor",
    "in_order",
    "is_plain",
    "is_within",
    "samples",
    "sliced",
    "tripled",
    "with_tensors",
]


def batch_size(call: ExampleInput) -> int | None:
    """Return the first dimension of the first tensor that has one; None if there is no such tensor."""
    shaped = (tensor for tensor in tensors_in((call.args, call.kwargs), objects=True) if tensor.dim())
    first = next(shaped, None)
    return None if first is None else len(first)


def first_sample(call: ExampleInput) -> ExampleInput:
    """Return the first sample, as a batch of one.

    Example:
        >>> call = first_sample(ExampleInput((torch.zeros(4, 3),), {"scale": torch.zeros(()), "flip": True}))
        >>> call.args[0].shape, call.kwargs
        (torch.Size([1, 3]), {'scale': tensor(0.), 'flip': True})
    """
    return first_samples(call, 1)


def first_samples(call: ExampleInput, limit: int | None) -> ExampleInput:
    """Return at most ``limit`` samples; all of them for None."""
    return call if limit is None else sliced(call, 0, limit)


def samples(call: ExampleInput, limit: int) -> list[ExampleInput]:
    """Return the first samples, each as a batch of one."""
    count = min(batch_size(call) or 0, limit)
    return [sliced(call, place, place + 1) for place in range(count)]


def sliced(call: ExampleInput, start: int, stop: int) -> ExampleInput:
    """Return the samples from ``start`` to before ``stop``."""
    return _batched(call, lambda tensor: tensor[start:stop])


def tripled(call: ExampleInput) -> ExampleInput:
    """Repeat the batch three times, to find a batch size that has become a constant."""
    return _batched(call, lambda tensor: torch.cat([tensor, tensor, tensor]))


def altered(call: ExampleInput) -> ExampleInput:
    """Change the values, not the shapes, within the range that they have: what a trace took as constant shows."""

    def alter(tensor: Tensor) -> Tensor:
        flipped = tensor.flip(list(range(1, tensor.dim())))
        return flipped * 0.85 + 0.05 if tensor.is_floating_point() else flipped

    return _mapped(call, alter)


def cloned(call: ExampleInput) -> ExampleInput:
    """Clone the tensors on the CPU, outside inference mode: a forward pass may write into its inputs."""
    with torch.inference_mode(False):
        return _mapped(call, lambda tensor: tensor.detach().cpu().clone())


def in_order(value: Any) -> Any:
    """Sort nested dicts by their keys: the order in which a runtime takes and returns tensors.

    Example:
        >>> in_order([{"b": 1, "a": (2, 3)}])
        [{'a': [2, 3], 'b': 1}]
    """
    if isinstance(value, Mapping):
        return {key: in_order(value[key]) for key in sorted(value, key=str)}
    return [in_order(item) for item in value] if isinstance(value, list | tuple) else value


def has_tensor(value: object) -> bool:
    """Check whether a value is or holds a tensor."""
    return next(tensors_in(value, objects=True), None) is not None


def is_plain(value: object) -> bool:
    """Check for what every runtime takes as it is: a tensor, a flat list or dict of tensors, a tuple of these."""
    if isinstance(value, tuple):
        return bool(value) and all(map(is_plain, value))
    if type(value) in (dict, OrderedDict):
        value = list(value.values())  # type: ignore[attr-defined]
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, Tensor) for item in items)


def with_tensors(value: Any, tensors: Iterable[Any]) -> Any:
    """Copy a container with other tensors, given in the order of `tensors_in`.

    Example:
        >>> with_tensors({"b": torch.zeros(()), "a": (torch.zeros(()), "flag")}, [torch.tensor(1), torch.tensor(2)])
        {'b': tensor(1), 'a': (tensor(2), 'flag')}
    """
    remaining = iter(tensors)
    return map_tensors(lambda _: next(remaining), value)


def _batched(call: ExampleInput, change: Callable[[Tensor], Tensor]) -> ExampleInput:
    """Change the tensors whose first dimension is the batch; others (a table, a scale) are not changed."""
    size = batch_size(call)
    return _mapped(call, lambda tensor: change(tensor) if tensor.dim() and len(tensor) == size else tensor)


def _mapped(call: ExampleInput, change: Callable[[Tensor], Any]) -> ExampleInput:
    return ExampleInput(map_tensors(change, call.args), map_tensors(change, call.kwargs))


class Positional(nn.Module):
    """A module whose forward takes the tensors of an example call by position; everything else is constant.

    Runtimes take tensors by position, and no flags, None or objects. A tensor, a flat list or dict of tensors, or a
    tuple of these is one input. Any other argument that holds tensors (a dataclass, a batch object, a dict with a
    flag) is taken apart: each of its tensors is one input, and ``forward`` puts the argument together again.

    Attributes:
        names: of the positional inputs.
        constants: what the call has besides tensors, by name.
        kept: ``keep``, as it was given.
        batched: for each positional input, in its structure, whether the first dimension is a dynamic batch.

    Args:
        model: the module.
        example: a call of it.
        batch: a call with a batch whose size is dynamic; None: all sizes are those of the example.
        keep: places of the tensors that are inputs (``x``, ``batch['image']``); others become constants. None: all.

    Raises:
        TraceError: the example is not a call of the module, or holds an object that cannot be taken apart.

    Example:
        >>> class Scaled(nn.Module):
        ...     def forward(self, x, *, scale, flip=False):
        ...         return x.flip(0) * scale["by"] if flip else x * scale["by"]
        >>> call = ExampleInput((torch.ones(2),), {"flip": False, "scale": {"by": torch.ones(2), "unit": "m"}})
        >>> module = Positional(Scaled(), call)
        >>> module.names, module.constants
        (('x', "scale['by']"), {"scale['unit']": 'm', 'flip': False})
        >>> module.batched
        (False, False)
        >>> module(torch.ones(2), torch.full((2,), 4.0))
        tensor([4., 4.])
    """

    def __init__(
        self,
        model: nn.Module,
        example: ExampleInput,
        batch: ExampleInput | None = None,
        keep: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._signature = inspect.signature(model.forward)
        self._example = self._named(example)
        self._keywords = list(self._bound(example).kwargs)
        tensors, self.constants = _parts(self._example, keep)
        self.names = tuple(
            name for name in tensors if keep is None or _within(name, _places(self._example)) <= set(keep)
        )
        self.kept = keep
        size = None if batch is None else batch_size(batch)
        given = self.tensors(batch or example)
        self.batched = map_tensors(lambda tensor: size is not None and tensor.dim() > 0 and len(tensor) == size, given)
        self._check_objects()

    @override
    def forward(self, *tensors: Any) -> Any:
        given = dict(zip(self.names, tensors, strict=True))
        values = {name: self._filled(name, value, given) for name, value in self._example.items()}
        args = [value for name, value in values.items() if name not in self._keywords]
        return self.model(*args, **{name: values[name] for name in self._keywords})

    @property
    def places(self) -> list[str]:
        """The places of all tensors of the example."""
        return _tensor_places(self._example)

    def misfit(self, call: ExampleInput) -> str | None:
        """Describe the inputs that a call lacks, or has in another structure; None if it has all."""
        found, wanted = _places(self._named(call)), _places(self._example)
        lacking = [name for name in self.names if _within(name, found) != _within(name, wanted)]
        if not lacking:
            return None
        return f"expected a call with {', '.join(self.names)}, found one without {', '.join(lacking)} as exported"

    def only(self, call: ExampleInput, inputs: Collection[str] | None) -> ExampleInput:
        """Leave out of a call what is not in ``inputs``: arguments that have a default, and items of dicts."""
        if inputs is None:
            return call
        bound, args = self._bound(call), list[Any]()
        kwargs: dict[str, Any] = {}
        for name, parameter in self._signature.parameters.items():
            value = bound.arguments.get(name, ())
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += value
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs |= {key: _only(key, item, inputs) for key, item in dict(value).items() if _is_in(key, inputs)}
            elif name not in bound.arguments or not (_is_in(name, inputs) or parameter.default is parameter.empty):
                continue
            elif parameter.kind is parameter.KEYWORD_ONLY or len(args) < list(self._signature.parameters).index(name):
                kwargs[name] = _only(name, value, inputs)
            else:
                args.append(_only(name, value, inputs))
        return ExampleInput(tuple(args), kwargs)

    def variation(self, call: ExampleInput) -> str:
        """List the values of a call that are constants of the file, and differ there; empty if there are none."""
        parameters = self._signature.parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        found, wanted = {**defaults, **self._named(call)}, {**defaults, **self._example}
        constants, expected = _parts(found)[1], _parts(wanted)[1]
        names = [name for name in {**expected, **constants} if name not in _tensor_places(found)]
        differing = [
            f"{name}={constants.get(name)!r:.60} (in the file {expected.get(name)!r:.60})"
            for name in names
            if not _same(constants.get(name), expected.get(name))
        ]
        more = [place for place in _tensor_places(found) if place not in _tensor_places(wanted)]
        return ", ".join([*differing, *(f"{place} (not in the file)" for place in more)])

    def tensors(self, call: ExampleInput) -> tuple[Any, ...]:
        """Return the positional inputs of a call without a `misfit`."""
        named = self._named(call)
        places = {**_places(named), **named}
        return tuple(places[name] for name in self.names)

    def _filled(self, name: str, value: Any, given: Mapping[str, Any]) -> Any:
        """Put the given tensors into one argument of the example."""
        if name in given:
            return given[name]
        parts = [(name + path, leaf) for path, leaf in named_leaves(value, objects=True) if isinstance(leaf, Tensor)]
        if not any(place in given for place, _ in parts):
            return value
        return with_tensors(value, [given.get(place, leaf) for place, leaf in parts])

    def _check_objects(self) -> None:
        """Take each argument apart and together once: an object may hold its tensors where they are not found."""
        places = _places(self._example)
        given = {name: _other(places[name]) for name in self.names if name not in self._example}
        for name, value in self._example.items():
            filled = _places({name: self._filled(name, value, given)})
            if lost := [place for place, leaf in filled.items() if place in given and not _equal(leaf, given[place])]:
                raise TraceError(
                    f"`{type(self.model).__name__}.forward({name}=...)`: expected tensors, or an object that can be "
                    f"copied with other tensors in it; found one of type {type(value).__name__}, a copy of which does "
                    f"not have the new {', '.join(lost)}. Register its class with "
                    "`torch.utils._pytree.register_pytree_node`, or export a small module that takes the tensors and "
                    "calls yours."
                )

    def _bound(self, call: ExampleInput) -> inspect.BoundArguments:
        try:
            return self._signature.bind(*call.args, **call.kwargs)
        except TypeError as error:
            raise TraceError(
                f"`{type(self.model).__name__}.forward{self._signature}`: expected an example that it can be called "
                f"with, found {len(call.args)} positional inputs and {list(call.kwargs)}: {error}. In an "
                "`example_input_array` a tuple holds the arguments and a dict the keyword arguments; a batch that is "
                "itself a dict goes into a tuple: `({...},)`."
            ) from error

    def _named(self, call: ExampleInput) -> dict[str, Any]:
        """Return the given arguments by name, in the order of the signature."""
        bound = self._bound(call)
        names = [name for name, kind in self._signature.parameters.items() if kind.kind <= kind.POSITIONAL_OR_KEYWORD]
        names += [f"argument {place}" for place in range(len(names), len(bound.args))]
        in_order = {name: bound.kwargs[name] for name in self._signature.parameters if name in bound.kwargs}
        positional = dict(zip(names, bound.args, strict=False))
        return {**positional, **in_order, **bound.kwargs}


def _places(named: Mapping[str, Any]) -> dict[str, Any]:
    """Map the paths of all leaves of the arguments to the leaves."""
    return {name + path: leaf for name, value in named.items() for path, leaf in named_leaves(value, objects=True)}


def _tensor_places(named: Mapping[str, Any]) -> list[str]:
    return [place for place, leaf in _places(named).items() if isinstance(leaf, Tensor)]


def is_within(place: str, name: str) -> bool:
    """Check whether a place is ``name``, or inside it: ``batch['image']`` in ``batch``."""
    return place == name or place.startswith((f"{name}[", f"{name}."))


def _within(name: str, places: Mapping[str, Any]) -> set[str]:
    """Return the places of the tensors of one input."""
    return {place for place, leaf in places.items() if isinstance(leaf, Tensor) and is_within(place, name)}


def _parts(named: Mapping[str, Any], keep: Collection[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into positional inputs and constants, both by name."""
    tensors: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for name, value in named.items():
        if is_plain(value) and (keep is None or set(_places({name: value})) <= set(keep)):
            tensors[name] = value
        elif not has_tensor(value):
            constants[name] = value
        else:
            for path, leaf in named_leaves(value, objects=True):
                (tensors if isinstance(leaf, Tensor) else constants)[name + path] = leaf
    return tensors, constants


def _is_in(name: str, inputs: Collection[str]) -> bool:
    return any(is_within(one, name) for one in inputs)


def _only(name: str, value: Any, inputs: Collection[str]) -> Any:
    """Leave out the tensors of a dict that are not in ``inputs``."""
    if name in inputs or not isinstance(value, dict) or not _is_in(name, inputs):
        return value
    kept = {key: item for key, item in value.items() if _is_in(f"{name}[{key!r}]", inputs) or not has_tensor(item)}
    return {key: _only(f"{name}[{key!r}]", item, inputs) for key, item in kept.items()}


def _other(tensor: Tensor) -> Tensor:
    """Return a tensor with other values."""
    return ~tensor if tensor.dtype is torch.bool else tensor + 1


def _equal(first: Tensor, second: Tensor) -> bool:
    return first is second or torch.equal(first, second)


def _same(first: object, second: object) -> bool:
    """Compare two values of any type; those that cannot be compared are not the same."""
    try:
        return first is second or bool(first == second)
    except (TypeError, ValueError, RuntimeError):  # arrays of several elements
        return False
