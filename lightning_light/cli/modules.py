"""Load the user's module of a checkpoint, and an example of its inputs."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_light.depth.blocks
import lightning_light.lowrank.build
import lightning_light.reparameterization.apply  # noqa: F401 - these register the operations of edit logs
from lightning_light.cli.checkpoints import read_checkpoint
from lightning_light.cli.errors import CommandError, expecting
from lightning_light.example_input import ExampleInput
from lightning_light.surgery.checkpoint import load_from_checkpoint
from lightning_light.surgery.manifest import KEY, Manifest, naming_file

__all__ = ["batches_of", "example_of", "import_class", "load_module", "random_input", "working"]


@contextmanager
def working(description: str) -> Iterator[None]:
    """Show that something is going on, where there is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(description):
        yield


def import_class(path: str) -> Any:
    """Import the class of a LightningModule by its path ``package.module:Class``."""
    found = _imported("--module", path)
    if not isinstance(found, type) or not hasattr(found, "load_from_checkpoint"):
        raise CommandError(f"`--module {path}`: expected the class of a LightningModule, found {found!r}.")
    return found


def _imported(option: str, path: str) -> Any:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise CommandError(f"`{option} {path}`: expected a path as package.module:Name.")
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise CommandError(f"`{option} {path}`: expected a class to import, found that {error}.") from error


def load_module(checkpoint: str, path: str) -> Any:
    """Load the compressed module in evaluation mode on the CPU."""
    cls = import_class(path)
    read_checkpoint(checkpoint)
    advice = "Give the class, and a checkpoint that holds its hyperparameters (`save_hyperparameters`)."
    with expecting(checkpoint, f"a checkpoint of `{path}`", advice), working(f"loading {checkpoint}"):
        return load_from_checkpoint(cls, checkpoint, map_location="cpu").eval()


def batches_of(module: Any, checkpoint: str, path: str | None, count: int) -> list[Any]:
    """Return the first validation batches of a data module, those that a function returns, or the module's own.

    Args:
        module: loaded from the checkpoint.
        checkpoint: with the hyperparameters of the data module, if that saves them.
        path: of the data module's class, or of a function without arguments that returns batches; None: the module has
            ``val_dataloader``.
        count: of the batches.
    """
    source = module if path is None else _imported("--data", path)
    advice = "Give a data module, or a function that returns batches: `--data package.module:MyData`."
    with expecting(path or checkpoint, "validation batches", advice), working("reading batches"):
        if hasattr(source, "load_from_checkpoint") and source is not module:
            source = source.load_from_checkpoint(checkpoint, weights_only=True)
        if hasattr(source, "val_dataloader"):
            source.prepare_data()
            source.setup("validate")
            loaders = tree_leaves(source.val_dataloader())
        else:
            loaders = [source()]
        found = list(islice(chain.from_iterable(loaders), count))
    if not found:
        raise CommandError(f"`{path or checkpoint}`: expected validation batches, found none.")
    return found


def example_of(module: nn.Module, checkpoint: str, shapes: Sequence[str] | None) -> ExampleInput:
    """Return the example input: of the given shapes, else the module's, else that in the checkpoint."""
    if shapes:
        return ExampleInput(tuple(map(_of_shape, shapes)))
    own = getattr(module, "example_input_array", None)
    if own is not None:
        return ExampleInput.of(own)
    found = read_checkpoint(checkpoint)
    with naming_file(checkpoint):
        states = Manifest.decode(found[KEY]).state.values() if KEY in found else ()
    stored = (ExampleInput(**state["example"]) for state in states if state.get("example"))
    example = next((each for each in stored if each.method == "forward"), None)
    if example is None:
        raise CommandError(
            f"`{checkpoint}`: expected an example input, found none in it, and no `example_input_array` in the module. "
            "Give the shape of a batch: `--example 1,3,32,32`."
        )
    return example


def random_input(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return normal noise, the same at every call; zeros, which are valid indices, where it is not floating point."""
    noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    return noise.to(dtype) if dtype.is_floating_point else torch.zeros(tuple(shape), dtype=dtype)


def _of_shape(text: str) -> Tensor:
    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = [0]
    if min(shape) < 1 or not isinstance(dtype, torch.dtype):
        raise CommandError(f"`--example {text}`: expected a shape and maybe a type, as 1,3,32,32 or 1,128:int64.")
    return random_input(shape, dtype)
