"""Make the tables of a report again from a checkpoint, without the module's class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_light.event_log import HISTORY
from lightning_light.measure import History, LayerRow, Snapshot
from lightning_light.report.contents import RunReport, curves_of
from lightning_light.validation import validated

__all__ = ["report_from_checkpoint"]

_RECORDERS = ("compression_report", "compression_monitor")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@validated
def report_from_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any]) -> RunReport:
    """Read the network before and after, its history and its events from a checkpoint.

    With a `CompressionReport` or `CompressionMonitor` in the run, this is what it recorded until the checkpoint was
    saved. Without one, parameters, channels and sparsity come from the shapes and values of the checkpoint itself; MACs
    are not known.

    Args:
        source: path of a checkpoint of Lightning, or the loaded checkpoint.

    Raises:
        ManifestError: the compression state of the checkpoint is damaged.
        ValueError: it has no ``state_dict``.

    Example:
        >>> weights = {"fc.weight": torch.ones(2, 4), "fc.bias": torch.zeros(2)}
        >>> print(report_from_checkpoint({"state_dict": weights}).layer_table())
          layer      channels  params  size
         ───────────────────────────────────
          fc                2      10   40B
        <BLANKLINE>
          total                    10   40B
          remaining              100%  100%
        <BLANKLINE>
        sparsity: 0%, unchanged
        bits per weight: 32, unchanged
    """
    from lightning_light.surgery.manifest import KEY, Manifest

    found = source if isinstance(source, Mapping) else torch.load(source, map_location="cpu", weights_only=True)
    weights: Mapping[str, Tensor] | None = found.get("state_dict")
    if not isinstance(weights, Mapping):
        path = "..." if isinstance(source, Mapping) else repr(os.fspath(source))
        raise ValueError(
            f"`report_from_checkpoint({path})`: expected a checkpoint of Lightning, found no 'state_dict' among "
            f"{sorted(map(str, found))[:8]}."
        )
    manifest = Manifest.decode(found[KEY]) if KEY in found else Manifest()
    recorded = next((manifest.state[name] for name in _RECORDERS if "now" in manifest.state.get(name, {})), None)
    reports = [state for key, state in found.get("callbacks", {}).items() if key.startswith("CompressionReport")]
    events = tuple(manifest.state.get(HISTORY, {}).get("events", ()))
    if recorded is None:
        after = _snapshot({name: tuple(tensor.shape) for name, tensor in weights.items()}, weights)
        return RunReport(_snapshot(manifest.fingerprint, {}) if manifest.fingerprint else after, after, events=events)
    return RunReport(
        Snapshot.from_plain(recorded["before"]),
        Snapshot.from_plain(recorded["now"]),
        History.from_plain(recorded["history"]),
        metrics=next((curves_of(state["metrics"]) for state in reports), {}),
        events=events,
    )


def _snapshot(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> Snapshot:
    """Take a snapshot from the shapes of parameters, and from their values where they are known."""
    layers: dict[str, list[str]] = {}
    for name in shapes:
        if name.rpartition(".")[2] not in _BUFFERS:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    rows = tuple(_row(layer, names, shapes, weights) for layer, names in layers.items())
    matrices = [weight for name, weight in weights.items() if name in shapes and weight.dim() > 1]
    elements = sum(weight.numel() for weight in matrices)
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in matrices)
    params = sum(row.params for row in rows)
    bits = sum(row.bits * row.params for row in rows) / params if params else 0.0
    return Snapshot(rows, params, None, sum(row.bytes for row in rows), zeros / elements if elements else 0.0, bits)


def _row(
    layer: str, names: list[str], shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]
) -> LayerRow:
    main = max(names, key=lambda name: len(shapes[name]))
    weight, shape = weights.get(main), shapes[main]
    params = sum(torch.Size(shapes[name]).numel() for name in names)
    size = 4 if weight is None else weight.element_size()
    zeros = 0.0 if weight is None or not weight.numel() else 1 - int(weight.count_nonzero()) / weight.numel()
    return LayerRow(
        name=layer,
        type="",
        channels_in=shape[1] if len(shape) > 1 else None,
        channels_out=shape[0] if shape else None,
        params=params,
        macs=0,
        sparsity=zeros,
        bits=8.0 * size,
        bytes=params * size,
    )
