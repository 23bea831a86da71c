"""Load an exported file in its runtime, to evaluate it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_light.export.exporter import Exporter
from lightning_light.export.functional import Batch, ExportOptions
from lightning_light.export.networks import run_in_parts
from lightning_light.validation import validated

__all__ = ["load_exported"]


@validated
def load_exported(
    path: str | os.PathLike[str],
    *,
    exporter: Exporter | None = ExportOptions.exporter,
    batch: Batch = ExportOptions.batch,
) -> Callable[..., Any]:
    """Load an exported file in its runtime, to be called with batches of any size.

    Args:
        path: of a file that `MobileExport` or `export_model` has written.
        exporter: that has written it, if not the default for the suffix.
        batch: that it was exported for.

    Returns:
        A function of the tensors that the report lists as ``inputs``, by position. A batch that is larger than the file
        takes is run in parts. It returns a tensor, or the list of them if the network returns several, those of a dict
        in the order of its keys.

    Raises:
        ValueError: the path does not end in the exporter's suffix.
        FileNotFoundError: there is no such file.
        UnsupportedError: the format or its runtime is not installed.

    Example:
        >>> import tempfile
        >>> from lightning_light.export import export_model, load_exported
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_model(model, torch.randn(4, 3, 8, 8), f"{folder}/model.ptl", latency_runs=5)
        ...     file = load_exported(f"{folder}/model.ptl")
        >>> file(torch.randn(100, 3, 8, 8)).shape
        torch.Size([100, 10])
    """
    options = ExportOptions(exporter, batch=batch)
    found = options.for_path(path)
    found.check()
    if not Path(path).exists():
        raise FileNotFoundError(
            f"`load_exported({str(path)!r})`: expected a file that `MobileExport` or `export_model` has written, found "
            "none. A failed export leaves none, nor does `fast_dev_run`."
        )
    run = found.load(Path(path))
    limit = {"one": 1, "as_given": None, "any": found.largest_batch}[batch]

    def file(*tensors: Any) -> Any:
        outputs = run_in_parts(run, tensors, limit, str(path))
        return outputs[0] if len(outputs) == 1 else outputs

    return file
