"""Call an exported file as the network that it was exported from is called."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_light.errors import ParityError, UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.export.inputs import Positional, batch_size, cloned, in_order, sliced
from lightning_light.export.program import flat_tensors
from lightning_light.nested import map_tensors, tensors_in

__all__ = ["ExportedNetwork", "ReferenceNetwork", "run_in_parts", "with_structure"]


class ReferenceNetwork:
    """The copy of the model that the file is compared with, called as the model is.

    Args:
        positional: the model's inputs by position.
        inputs: what is left of a call; None for all of it.
    """

    def __init__(self, positional: Positional, inputs: Collection[str] | None = None) -> None:
        self.positional, self._inputs = positional, inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copy; the inputs may be on any device and are not changed."""
        call = cloned(self.positional.only(ExampleInput(args, kwargs), self._inputs))
        return self.positional.model(*call.args, **call.kwargs)


@dataclass(frozen=True, eq=False)
class ExportedNetwork:
    """The exported file, called as the model is: any batch size, keyword arguments, outputs in their structure.

    Args:
        positional: the model's inputs by position, as the file takes them.
        run: the file in its runtime, as `Exporter.load` returns it.
        structure: an output of the model.
        largest_batch: the largest batch that the file takes; larger ones are run in parts. None: any.
        path: of the file, for messages.
        inputs: as of `ReferenceNetwork`.
    """

    positional: Positional
    run: Callable[..., Any]
    structure: Any
    largest_batch: int | None
    path: str
    inputs: Collection[str] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file.

        Raises:
            ParityError: the call lacks an input of the file.
        """
        call = cloned(self.positional.only(ExampleInput(args, kwargs), self.inputs))
        if (misfit := self.positional.misfit(call)) is not None:
            raise ParityError(f"The file {self.path!r}: {misfit}. Export an example with the same inputs.")
        outputs = run_in_parts(self.run, self.positional.tensors(call), self.largest_batch, self.path)
        return with_structure(outputs, self.structure)


def run_in_parts(run: Callable[..., Any], tensors: tuple[Any, ...], limit: int | None, path: str) -> list[Tensor]:
    """Run a file on a batch of any size, in parts of at most ``limit`` samples.

    Args:
        run: the file in its runtime.
        tensors: its positional inputs.
        limit: samples per call; None for all at once.
        path: of the file, for the message.

    Returns:
        The output tensors, dicts in the order of their keys.

    Raises:
        UnsupportedError: an output has no batch dimension by which parts can be joined.
    """
    call = ExampleInput(tensors, {})
    size = batch_size(call)
    if limit is None or size is None or size <= limit:
        return flat_tensors(run(*tensors))
    parts = [flat_tensors(run(*sliced(call, start, start + limit).args)) for start in range(0, size, limit)]
    joined = [torch.cat(part) if part[0].dim() else torch.stack(part) for part in zip(*parts, strict=True)]
    if any(len(tensor) != size for tensor in joined):
        raise UnsupportedError(
            f"The file {path!r}, run on {size} samples in parts: expected outputs whose first dimension is the batch, "
            f"found {[list(tensor.shape) for tensor in parts[0]]} for a part. Give it at most {limit} samples."
        )
    return joined


def with_structure(tensors: list[Tensor], structure: Any) -> Any:
    """Put the tensors of a flat list, dicts in the order of their keys, into the structure of a model's output.

    Example:
        >>> found = with_structure([torch.tensor(1), torch.tensor(2)], {"b": torch.zeros(()), "a": torch.zeros(())})
        >>> found
        {'b': tensor(2), 'a': tensor(1)}
    """
    ordered = tensors_in(in_order(structure), objects=True)
    placed = {id(old): tensor for old, tensor in zip(ordered, tensors, strict=True)}
    return map_tensors(lambda old: placed[id(old)], structure)
