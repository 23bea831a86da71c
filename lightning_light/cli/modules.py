"""Load the user's module of a checkpoint, and an example of its inputs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import lightning_light.depth.blocks
import lightning_light.lowrank.build
import lightning_light.reparameterization.apply  # noqa: F401 - these register the operations of edit logs
from lightning_light.cli.checkpoints import read_checkpoint
from lightning_light.cli.errors import CommandError, expecting
from lightning_light.example_input import ExampleInput
from lightning_light.surgery.checkpoint import load_from_checkpoint
from lightning_light.surgery.manifest import KEY, Manifest, naming_file

__all__ = ["example_of", "import_class", "load_module", "random_input", "working"]


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
    """Import a class by its path ``package.module:Class``."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise CommandError(f"`--module {path}`: expected package.module:MyModule.")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise CommandError(f"`--module {path}`: expected a class to import, found that {error}.") from error
    if not isinstance(found, type) or not hasattr(found, "load_from_checkpoint"):
        raise CommandError(f"`--module {path}`: expected the class of a LightningModule, found {found!r}.")
    return found


def load_module(checkpoint: str, path: str) -> Any:
    """Load the compressed module in evaluation mode on the CPU."""
    cls = import_class(path)
    read_checkpoint(checkpoint)
    advice = "Give the class, and a checkpoint that holds its hyperparameters (`save_hyperparameters`)."
    with expecting(checkpoint, f"a checkpoint of `{path}`", advice), working(f"loading {checkpoint}"):
        return load_from_checkpoint(cls, checkpoint, map_location="cpu").eval()


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
