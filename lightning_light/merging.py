"""Merge the parallel branches of blocks that know how to, and tell branches from what they merge into.

A block merges itself through a method of its own: ``fuse``, ``reparameterize`` or ``switch_to_deploy``, as blocks of
timm, RepVGG and the YOLO family have it. `BranchedLayer` is the base class of this package's own branches.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.errors import ParityError, UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated
from lightning_light.nested import tensors_in

__all__ = [
    "TOLERANCE",
    "BranchedLayer",
    "branch_of",
    "check_merged",
    "is_training_branch",
    "merge_blocks",
    "merging_method",
]

TOLERANCE = 1e-4
"""Largest difference of the outputs of a network and of the merged one, over the largest output."""

_METHODS = ("fuse", "reparameterize", "switch_to_deploy", "fuse_convs")
_MERGED_FORWARD = "forward_fuse"
_OPTIONAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class BranchedLayer(nn.Module, ABC):
    """A layer that was expanded to parallel branches, and computes in evaluation mode what one layer can.

    Attributes:
        branches: what disappears when it is merged; the rest costs what the merged layer costs.
    """

    branches: nn.ModuleList

    @abstractmethod
    def fuse(self) -> nn.Module:
        """Return the layer that computes in evaluation mode what this one does, with tensors of its own."""


def is_training_branch(model: nn.Module) -> Callable[[str], bool]:
    """Return a test whether a module or tensor of ``model``, by its name, disappears when branches are merged.

    Example:
        >>> is_training_branch(nn.Sequential(nn.Linear(2, 2)))("0.weight")
        False
    """
    prefixes = tuple(
        f"{path}.branches." if path else "branches."
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BranchedLayer)
    )
    return lambda name: name.startswith(prefixes)


def merging_method(module: nn.Module) -> str | None:
    """Return the name of the method by which ``module`` merges its branches, or None.

    Example:
        >>> class Block(nn.Module):
        ...     def reparameterize(self): ...
        ...     def fuse(self, left, right): ...
        >>> merging_method(Block()), merging_method(nn.Conv2d(1, 1, 1))
        ('reparameterize', None)
    """
    if type(module).__module__.partition(".")[0] == "torch":
        return None
    return next((name for name in _METHODS if _is_callable_without_arguments(getattr(type(module), name, None))), None)


def branch_of(model: nn.Module, name: str) -> str | None:
    """Return the name of the innermost block around the module ``name`` that merges itself, or None.

    The model itself does not count: a method of a whole network is not about one layer.
    """
    parts = name.split(".")
    paths = (".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1))
    return next((path for path in paths if merging_method(model.get_submodule(path))), None)


def merge_blocks(model: nn.Module) -> dict[str, str]:
    """Merge the branches of every block that has a method for it, in place.

    The outermost block comes first; what it leaves is searched again. Merged blocks use the running statistics of
    their batch norms, so the function stays the same in evaluation mode only. The random generators are restored.

    Args:
        model: any module; it cannot be replaced itself, only what is inside.

    Returns:
        Name of each block that has changed -> the method that was called.

    Raises:
        UnsupportedError: the method of ``model`` itself returns another module.
    """
    merged: dict[str, str] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        if _merge(model, "", merged) is not model:
            raise UnsupportedError(
                f"`merge_blocks({type(model).__name__})`: expected a network with blocks inside, found one that is "
                "replaced as a whole. Put it into another module, for instance `torch.nn.Sequential(model)`."
            )
        _merge_children(model, "", merged, {model: model})
    return merged


def check_merged(
    call: str, model: nn.Module, changed: nn.Module, example: ExampleInput, tolerance: float, *, mend: str = ""
) -> float:
    """Compare the outputs of a model and of its merged, or expanded, copy in evaluation mode.

    Args:
        call: what the user wrote, for the error message.
        model: as it was.
        changed: what it has become.
        example: one call of both.
        tolerance: largest difference over the largest output.
        mend: how to avoid the change, for the error message: a sentence.

    Returns:
        The largest difference over the largest output.

    Raises:
        ParityError: the difference is above ``tolerance``, or not a number.
    """
    before, after = (_outputs(one, example) for one in (model, changed))
    scale = max((float(tensor.abs().max()) for tensor in before if tensor.numel()), default=0.0)
    found = max((float((a - b).abs().max()) for a, b in zip(before, after, strict=True) if a.numel()), default=0.0)
    error = found / scale if scale else found
    if not error <= tolerance:
        raise ParityError(
            f"`{call}`: expected the same outputs in evaluation mode, within {tolerance:g} of the largest, found a "
            f"difference of {error:.2g}. Does a method `fuse`, `reparameterize` or `switch_to_deploy` change what its "
            f"block computes? Rename it if it is not about merging branches. {mend}".rstrip()
        )
    return error


def _outputs(model: nn.Module, example: ExampleInput) -> list[Tensor]:
    moved = example.to(model)
    with isolated(model):
        return [tensor.double() for tensor in tensors_in(model(*moved.args, **moved.kwargs))]


def _merge_children(parent: nn.Module, path: str, merged: dict[str, str], done: dict[nn.Module, nn.Module]) -> None:
    for key, child in list(parent._modules.items()):
        if child is None:
            continue
        if child not in done:
            name = f"{path}.{key}" if path else key
            done[child] = new = _merge(child, name, merged)
            done[new] = new
            _merge_children(new, name, merged, done)
        parent._modules[key] = done[child]


def _merge(module: nn.Module, name: str, merged: dict[str, str]) -> nn.Module:
    """Call the merging method of one block; return what takes its place, which may be the block itself."""
    method = merging_method(module)
    if method is None:
        return module
    before, modes = _structure(module), {part: part.training for part in module.modules()}
    result: Any = getattr(module.eval(), method)()
    new = result if isinstance(result, nn.Module) else module
    if new is module and _structure(module) != before and hasattr(module, _MERGED_FORWARD):
        vars(module)["forward"] = getattr(module, _MERGED_FORWARD)
    if new is not module or _structure(module) != before:
        merged[name] = method
    new.train(modes[module])
    for part, mode in modes.items():
        part.training = mode
    return new


def _structure(module: nn.Module) -> list[tuple[Any, ...]]:
    classes = ((name, type(part), "forward" in vars(part)) for name, part in module.named_modules())
    return [*classes, *((name, tuple(tensor.shape)) for name, tensor in module.named_parameters())]


def _is_callable_without_arguments(method: Any) -> bool:
    if not inspect.isfunction(method):
        return False
    _, *parameters = inspect.signature(method).parameters.values()
    return all(one.default is not one.empty or one.kind in _OPTIONAL for one in parameters)
