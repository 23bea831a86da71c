"""Copy the structure of a network without its weights, and bring a live network to another structure.

A checkpoint's edit log is never replayed on the live module, but on a copy that shares everything with it except the
module tree and the tensors. If that succeeds, the live tree follows the copy: modules whose class is the same stay the
same objects, and so do their parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_light.host.modules import RUN_STATE
from lightning_light.host.patches import patches_of
from lightning_light.surgery.data import set_data

PRIVATE_PREFIX = "_lightning_light"
"""Prefix of attributes and training-only children that this package adds: they are not part of a structure."""

_PLAIN = (int, float, bool, str, type(None), torch.Size)


def copy_structure(model: nn.Module) -> nn.Module:
    """Return a module tree of the same classes as ``model``'s, with parameters and persistent buffers on ``meta``.

    Other attributes are shared, not copied, so the user's objects need not be copyable. Shared modules and tied
    parameters stay shared. Non-persistent buffers keep their values.
    """
    return _Copier().module(model, root=True)


class _Copier:
    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._tensors: dict[int, Tensor] = {}

    def module(self, original: nn.Module, root: bool = False) -> nn.Module:
        if isinstance(original, torch.jit.ScriptModule):
            return original  # cannot be edited, so need not be copied
        if id(original) not in self._modules:
            copy = object.__new__(type(original))
            self._modules[id(original)] = copy
            self._fill(original, copy, root)
        return self._modules[id(original)]

    def _fill(self, original: nn.Module, copy: nn.Module, root: bool) -> None:
        shared = {name: value for name, value in vars(original).items() if not name.startswith(PRIVATE_PREFIX)}
        if root:
            for patch in patches_of(original):  # a copy would keep the run and its teacher
                shared.pop(patch.name, None)
            shared.update({name: None for name in RUN_STATE if name in shared})
        transient = set(original._non_persistent_buffers_set)
        copy.__dict__.update(shared)
        copy.__dict__["_non_persistent_buffers_set"] = transient
        copy.__dict__["_parameters"] = {name: self._tensor(p) for name, p in _without_ours(original._parameters)}
        copy.__dict__["_buffers"] = {
            name: b.detach() if name in transient and b is not None else self._tensor(b)
            for name, b in _without_ours(original._buffers)
        }
        copy.__dict__["_modules"] = {
            name: None if child is None else self.module(child) for name, child in _without_ours(original._modules)
        }

    def _tensor(self, original: Tensor | None) -> Tensor | None:
        if original is None or is_lazy(original):
            return original
        if id(original) not in self._tensors:
            copy = torch.empty_like(original.detach(), device="meta")
            if isinstance(original, nn.Parameter):
                copy = nn.Parameter(copy, original.requires_grad)
                copy.__dict__.update(original.__dict__)
            self._tensors[id(original)] = copy
        return self._tensors[id(original)]


def _without_ours(named: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in named.items() if not name.startswith(PRIVATE_PREFIX))


@dataclass(frozen=True)
class Difference:
    """The difference between two structures.

    Attributes:
        attributes: module name -> attribute -> value in the second structure.
        removed: module name -> attributes that only the first one has.
        replaced: names of modules whose class differs, or that only the second one has.
    """

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    removed: dict[str, list[str]] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)

    def concerns(self, module: str) -> bool:
        """Check whether ``module``, or one that contains it, differs."""
        inside = any(not name or module == name or module.startswith(f"{name}.") for name in self.replaced)
        return inside or module in self.attributes or module in self.removed


def compare(current: nn.Module, target: nn.Module) -> Difference:
    """Compare two structures module by module; modules of the same class by their plain attributes."""
    difference = Difference()
    for name, first, second in _pairs(current, target):
        if type(first) is not type(second):
            difference.replaced.append(name)
            continue
        assert first is not None  # of the same class as `second`
        changed = {key: value for key, value in _plain(second).items() if not _same(vars(first).get(key), value)}
        if changed:
            difference.attributes[name] = changed
        gone = [key for key in _plain(first) if key not in vars(second)]
        if gone:
            difference.removed[name] = gone
    return difference


def _pairs(
    current: nn.Module | None, target: nn.Module, name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module | None, nn.Module]]:
    """Yield the modules at the same path of both trees, but none below modules of different classes."""
    seen = set() if seen is None else seen
    if id(target) in seen:
        return
    seen.add(id(target))
    yield name, current, target
    if current is not None and type(current) is type(target):
        for key, child in target._modules.items():
            if child is not None:
                yield from _pairs(current._modules.get(key), child, f"{name}.{key}" if name else key, seen)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key != "training" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _same(first: Any, second: Any) -> bool:
    return _is_plain(first) and type(first) is type(second) and bool(first == second)


def apply_structure(live: nn.Module, current: nn.Module, target: nn.Module) -> None:
    """Bring ``live`` from the structure ``current`` to the structure ``target``.

    What is equal in both is left alone, so additions of the user or another callback to the live module are kept.
    New tensors, and those whose shape changes, are uninitialized afterwards: a state dict is about to be loaded.

    Args:
        live: the network to change; nothing is validated here.
        current: a copy of its structure.
        target: the structure to reach. Its new modules become part of ``live``, so it must not be used afterwards.
    """
    _Applier(live).run(current, target)


class _Applier:
    def __init__(self, live: nn.Module) -> None:
        self._live = live
        reference = next((p for p in live.parameters() if p.is_floating_point() and not is_lazy(p)), None)
        self._device = torch.device("cpu") if reference is None else reference.device
        floats = {p.dtype for p in live.parameters() if p.is_floating_point()}
        self._dtype = floats.pop() if len(floats) == 1 else None  # a network of one precision stays of that one
        self._modules: dict[int, nn.Module] = {}  # target -> live
        self._tensors: dict[int, Tensor] = {}
        self._taken: set[int] = set()

    def run(self, current: nn.Module, target: nn.Module) -> None:
        difference = compare(current, target)
        pairs = list(self._match(self._live, current, target))
        for name, live, before, after in pairs:
            for key, value in difference.attributes.get(name, {}).items():
                setattr(live, key, value)
            for key in difference.removed.get(name, []):
                vars(live).pop(key, None)
            self._adopt(live, before, after)

    def _match(
        self, live: nn.Module, current: nn.Module, target: nn.Module
    ) -> Iterator[tuple[str, nn.Module, nn.Module, nn.Module]]:
        for name, before, after in _pairs(current, target):
            found = self._find(live, name)
            if before is not None and type(before) is type(after) and found is not None:
                self._modules[id(after)] = found
                for kind in ("_parameters", "_buffers"):
                    self._match_tensors(getattr(found, kind), getattr(after, kind))
                yield name, found, before, after

    @staticmethod
    def _find(live: nn.Module, name: str) -> nn.Module | None:
        for key in name.split(".") if name else ():
            child = live._modules.get(key)
            if child is None:
                return None
            live = child
        return live

    def _match_tensors(self, live: Mapping[str, Tensor | None], target: Mapping[str, Tensor | None]) -> None:
        for key, wanted in target.items():
            found = live.get(key)
            if found is None or wanted is None or id(wanted) in self._tensors:
                continue
            if id(found) not in self._taken:  # tied now, and not in the target: only one of them keeps the object
                self._tensors[id(wanted)] = found
                self._taken.add(id(found))

    def _adopt(self, live: nn.Module, current: nn.Module, target: nn.Module) -> None:
        live._non_persistent_buffers_set -= current._non_persistent_buffers_set
        live._non_persistent_buffers_set |= target._non_persistent_buffers_set
        for kind in ("_parameters", "_buffers"):
            have, had = getattr(live, kind), getattr(current, kind)
            wanted = {k: self._tensor(t) for k, t in getattr(target, kind).items() if k in have or k not in had}
            _update(have, had, wanted)
        have, had = live._modules, current._modules
        children = {
            key: self._module(child, live.training)
            for key, child in target._modules.items()
            if key in have or key not in had  # else removed by the user, and in both structures
        }
        _update(have, had, children)

    def _tensor(self, wanted: Tensor | None) -> Tensor | None:
        if wanted is None or is_lazy(wanted):
            return wanted
        live = self._tensors.get(id(wanted))
        if live is None:
            live = self._tensors[id(wanted)] = self._new_tensor(wanted)
        elif live.shape != wanted.shape:
            on_meta = wanted.device.type == "meta"
            data = torch.empty(wanted.shape, dtype=live.dtype, device=live.device) if on_meta else wanted.to(live)
            live.grad = None
            set_data(live, data)
        return live

    def _new_tensor(self, wanted: Tensor) -> Tensor:
        """Create a tensor on the live network's device, with values only if it is not part of a state dict."""
        dtype = self._dtype if self._dtype is not None and wanted.is_floating_point() else wanted.dtype
        if wanted.device.type == "meta":
            data = torch.empty_like(wanted.detach(), dtype=dtype, device=self._device)
        else:
            data = wanted.detach().clone().to(self._device)
        if not isinstance(wanted, nn.Parameter):
            return data
        new = nn.Parameter(data.to(dtype), wanted.requires_grad)
        new.__dict__.update(wanted.__dict__)
        return new

    def _module(self, target: nn.Module | None, training: bool) -> nn.Module | None:
        """Return the live module that corresponds to ``target``, or ``target`` itself with new tensors."""
        if target is None or id(target) in self._modules or isinstance(target, torch.jit.ScriptModule):
            return None if target is None else self._modules.get(id(target), target)
        self._modules[id(target)] = target
        target.training = training
        for kind in ("_parameters", "_buffers"):
            tensors = getattr(target, kind)
            tensors.update({key: self._tensor(value) for key, value in tensors.items()})
        children = target._modules
        children.update({key: self._module(child, training) for key, child in children.items()})
        return target


def _update(live: dict[str, Any], current: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Make ``live`` equal to ``wanted``, in that order, followed by entries that are in neither structure."""
    extra = {key: value for key, value in live.items() if key not in wanted and key not in current}
    after = {**wanted, **extra}
    if list(live) == list(after) and all(live[key] is value for key, value in after.items()):
        return
    live.clear()
    live.update(after)
