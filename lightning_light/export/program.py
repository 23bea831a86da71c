"""Trace a network with `torch.export`, for the formats that are built on it."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten
from typing_extensions import override

from lightning_light.errors import LightningLightError, TraceError
from lightning_light.example_input import ExampleInput
from lightning_light.export.inputs import Positional, cloned, has_tensor, in_order
from lightning_light.isolation import plain_attention
from lightning_light.nested import named_leaves, tensors_in
from lightning_light.warning_filters import ignored_warnings

__all__ = ["FAILURES", "Flat", "Program", "advice", "check_outputs", "flat_tensors", "quiet_torch", "traced"]

FAILURES = (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, LookupError)
"""Exceptions of a network's own code, and of `torch.export` and formats built on it for one they cannot express."""


def flat_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts, dicts in the order of their keys.

    Example:
        >>> flat_tensors(({"b": torch.tensor(1), "a": torch.tensor(2)}, "flag", [torch.tensor(3)]))
        [tensor(2), tensor(1), tensor(3)]
    """
    return list(tensors_in(in_order(value), objects=True))


def check_outputs(model: nn.Module, outputs: Any) -> None:
    """Refuse outputs that are neither tensors nor None: they would be constants of the file.

    Raises:
        TraceError: names their types.
    """
    leaves = [leaf for _, leaf in named_leaves(outputs) if leaf is not None and not has_tensor(leaf)]
    if leaves:
        raise TraceError(
            f"`{type(model).__name__}`: expected outputs that are tensors or None, in tuples, lists, dicts and "
            f"objects; found {', '.join(sorted({type(leaf).__name__ for leaf in leaves}))}. Return tensors, or export "
            "a small module that calls yours and does so."
        )


class Flat(nn.Module):
    """A module whose inputs and outputs are flat sequences of tensors: `flat_tensors` of the model's.

    Attributes:
        inputs: name of each input tensor: ``x``, ``record_image``.
        outputs: name of each output tensor: ``output``, ``logits`` of a dict.
        batched: whether the first dimension of an input is a dynamic batch.
    """

    def __init__(self, model: Positional, tensors: tuple[Any, ...]) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._spec = tree_flatten(tensors)
        order = tree_leaves(in_order(tree_unflatten(list(range(len(self._leaves))), self._spec)))
        self._places = [place for place in order if isinstance(self._leaves[place], Tensor)]
        flags = tree_leaves(model.batched)
        self.batched = [bool(flags[place]) for place in self._places]
        self.inputs = _unique(
            [
                name + keystr(path)
                for name, value in zip(model.names, tensors, strict=True)
                for path, leaf in tree_flatten_with_path(in_order(value))[0]
                if isinstance(leaf, Tensor)
            ]
        )
        self._writes_to_inputs = False
        self.outputs = self._tried()
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]

    @override
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor.clone() if self._writes_to_inputs else tensor
        return tuple(flat_tensors(self.model(*tree_unflatten(leaves, self._spec))))

    def _tried(self) -> list[str]:
        """Call the module once, to name its outputs and to find out whether it writes to its inputs."""
        given = cloned(ExampleInput(tuple(self._leaves))).args
        versions = [given[place]._version for place in self._places]
        found = named_leaves(in_order(self.model(*tree_unflatten(list(given), self._spec))), objects=True)
        self._writes_to_inputs = versions != [given[place]._version for place in self._places]
        return _unique([path or "output" for path, leaf in found if isinstance(leaf, Tensor)], otherwise="output")


def _unique(paths: list[str], otherwise: str = "") -> list[str]:
    """Names that are valid identifiers: ``extra['a']`` -> ``extra_a``, ``[0]`` -> ``output_0``."""
    names: list[str] = []
    for path in paths:
        name = re.sub(r"\W+", "_", path).strip("_")
        name = f"{otherwise}_{name}" if name[:1].isdigit() and otherwise else name
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


@dataclass(frozen=True, eq=False)
class Program:
    """A network traced by `torch.export`.

    Attributes:
        graph: the exported program.
        inputs: name of each input tensor.
        outputs: name of each output tensor.
        example: inputs of the trace.
    """

    graph: torch.export.ExportedProgram
    inputs: list[str]
    outputs: list[str]
    example: tuple[Tensor, ...]


def traced(call: str, model: Positional, tensors: tuple[Any, ...], *, largest: int | None = None) -> Program:
    """Trace ``model`` by `torch.export`, with a dynamic batch size where ``model.batched`` marks it.

    Args:
        call: the exporter, as the user wrote it.
        model: a copy in evaluation mode; parametrizations become plain weights.
        tensors: an example call, one sample.
        largest: samples in a batch, at most.

    Raises:
        TraceError: the network has a branch or a size that depends on values, or gives other things than tensors.
    """
    _settle(model)
    try:
        flat = Flat(model, tensors)
        example = tuple(
            torch.cat([tensor, tensor]) if batched else tensor  # torch.export takes a size of one for a constant
            for tensor, batched in zip(flat_tensors(tensors), flat.batched, strict=True)
        )
        size = {0: torch.export.Dim("batch", min=1, max=largest)} if any(flat.batched) else None
        shapes = tuple(size if batched else None for batched in flat.batched)
        with plain_attention(), quiet_torch():
            graph = torch.export.export(flat.eval(), example, dynamic_shapes={"tensors": shapes}, strict=False)
    except LightningLightError:
        raise
    except FAILURES as error:
        raise TraceError(advice(call, model, error)) from error
    return Program(graph, flat.inputs, flat.outputs, example)


def _settle(model: nn.Module) -> None:
    """Replace each parametrized tensor by its present value, which becomes a constant of the file.

    `torch.nn.utils.parametrize` would take the property off the class, which the live module shares.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
            module.__class__ = type(module).__bases__[0]
            del module.parametrizations
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def advice(call: str, model: Positional, error: BaseException) -> str:
    """Write the message for the author of the network."""
    name, text = type(model.model).__name__, str(error).strip()
    first = next(iter(text.splitlines()), type(error).__name__)
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        return (
            f"`{call}` on `{name}`: expected a forward without control flow that depends on values of tensors, found a "
            f"branch, a loop or a size that does. {first} Write it with tensor operations (`torch.where`), or use "
            "`TorchScriptLite()`, which keeps the side that the example takes."
        )
    if any(tree_leaves(model.batched)) and (
        "batch" in text and ("Constraints violated" in text or "specializ" in text)
    ):
        return (
            f"`{call}` on `{name}`: expected a forward that takes any batch size, found one with a constant size. "
            "Use `x.flatten(1)` and `x.shape[0]` without `int(...)`, or export for one sample at a time with "
            f"`batch='one'`; inputs without a batch dimension need `batch='as_given'`. {first}"
        )
    return (
        f"`{call}` on `{name}`: expected a network that the format can express with inputs {', '.join(model.names)}; "
        f"found {type(error).__name__}: {first} Check that `model.eval()(...)` runs on one sample on the CPU, and that "
        "`forward` uses torch operations only."
    )


def quiet_torch() -> AbstractContextManager[None]:
    """Silence warnings of torch about its own code during the export, and no others."""
    return ignored_warnings(
        r"`isinstance\(treespec, LeafSpec\)`",
        r"(?s)The tensor attributes? .* assigned during export",
        "_check_is_size will be removed",
    )
