"""Choose the exporter by the suffix of the path."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_light.export.executorch import ExecuTorch
from lightning_light.export.exporter import Exporter
from lightning_light.export.onnx import ONNX
from lightning_light.export.torch_export import TorchExport
from lightning_light.export.torchscript_lite import TorchScriptLite

__all__ = ["exporter_of"]

_EXPORTERS: tuple[type[Exporter], ...] = (TorchScriptLite, ExecuTorch, ONNX, TorchExport)


def exporter_of(path: str | os.PathLike[str], exporter: Exporter | None) -> Exporter:
    """Return the given exporter, or the default one for the suffix of ``path``.

    Args:
        path: of the file.
        exporter: None to choose by the suffix.

    Raises:
        ValueError: the suffix is not the exporter's, or no exporter's.

    Example:
        >>> exporter_of("model.onnx", None)
        ONNX(opset=18, dynamic_batch=True)
    """
    suffix = Path(path).suffix
    if exporter is not None:
        if suffix != exporter.suffix:
            raise ValueError(
                f"`{str(path)!r}` with `exporter={exporter}`: expected a path that ends in {exporter.suffix!r}, found "
                f"{suffix!r}. Write {str(Path(path).with_suffix(exporter.suffix))!r}."
            )
        return exporter
    for kind in _EXPORTERS:
        if suffix == kind.suffix:
            return kind()
    known = ", ".join(f"{kind.suffix!r} ({kind.__name__})" for kind in _EXPORTERS)
    raise ValueError(
        f"`{str(path)!r}`: expected a path that ends in one of {known}, found {suffix!r}. Write "
        f"{str(Path(path).with_suffix('.pte'))!r}; another format needs an exporter of your own."
    )
