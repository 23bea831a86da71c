"""An exported file in the hands of whoever evaluates it: called as the network was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.export.exporter import Exporter
from lightning_light.export.functional import BATCH, EXPORTER, Batch, check_options
from lightning_light.export.inputs import batch_size, sliced
from lightning_light.export.program import flat_tensors

__all__ = ["load_exported"]


def load_exported(
    path: str | os.PathLike[str], *, exporter: Exporter = EXPORTER, batch: Batch = BATCH
) -> Callable[..., Any]:
    """The file in its runtime, called with whole batches, whatever the runtime: to measure its accuracy, for one.

    Args:
        path: of a file that `MobileExport` or `export_model` has written.
        exporter: that has written it.
        batch: that it was exported for.

    Returns:
        A function of the tensors that the report lists as ``inputs``, by position. A batch that is larger than the
        file takes is asked for in parts. It gives a tensor, or the list of them if the network gives several, a dict's
        in the order of its keys.

    Raises:
        ValueError: the path does not end in the exporter's suffix.
        FileNotFoundError: there is no such file.
        UnsupportedError: the format or its runtime is not installed.

    Example:
        >>> import tempfile
        >>> from lightning_light.export import export_model, load_exported
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_model(model, (torch.randn(4, 3, 8, 8),), f"{folder}/model.ptl", latency_runs=5)
        ...     file = load_exported(f"{folder}/model.ptl")
        >>> file(torch.randn(100, 3, 8, 8)).shape
        torch.Size([100, 10])
    """
    check_options(path, exporter, batch, runs=1, threads=1)
    exporter.check()
    if not Path(path).exists():
        raise FileNotFoundError(
            f"`load_exported({str(path)!r})`: expected a file that `MobileExport` or `export_model` has written, found "
            "none. After a failed export there is none, nor with `fast_dev_run`."
        )
    run, limit = exporter.load(Path(path)), 1 if batch == "one" else exporter.largest_batch

    def file(*tensors: Any) -> Any:
        call = ExampleInput(tensors, {})
        size = batch_size(call)
        if batch == "as_given" or limit is None or size is None or size <= limit:
            found = flat_tensors(run(*tensors))
        else:
            parts = [sliced(call, start, start + limit).args for start in range(0, size, limit)]
            found = _joined([flat_tensors(run(*part)) for part in parts], size, str(path))
        return found[0] if len(found) == 1 else found

    return file


def _joined(parts: list[list[Tensor]], size: int, path: str) -> list[Tensor]:
    """What the file has said to one part after the other, as it would say to all at once."""
    found = [torch.cat(part) if part[0].dim() else torch.stack(part) for part in zip(*parts, strict=True)]
    if any(len(tensor) != size for tensor in found):
        raise UnsupportedError(
            f"The file {path!r}, asked for {size} samples in parts: expected outputs whose first dimension is the "
            f"batch, found {[list(tensor.shape) for tensor in parts[0]]} for a part. Give it at most as many samples "
            "as it takes."
        )
    return found
