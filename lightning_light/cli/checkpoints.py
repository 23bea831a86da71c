"""Commands that read checkpoints, without the module's class."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lightning_light.cli.errors import CommandError, expecting
from lightning_light.formatting import DataTable, human_bytes, plural
from lightning_light.measure import compression_table, file_bytes
from lightning_light.report import RunReport, report_from_checkpoint, write_report
from lightning_light.surgery.manifest import KEY, Manifest, naming_file

__all__ = ["diff", "inspect", "read_checkpoint", "report"]

_SHOWN = 4  # names in a cell


def inspect(checkpoint: str) -> None:
    """Print structure, history and owners."""
    found, manifest, run = _read(checkpoint)
    sys.stdout.write(_heading(checkpoint, found, manifest))
    run.layer_table().write()
    if run.events:
        run.event_table().write()
    if manifest.owners:
        _claims_table(manifest).write()


def diff(before: str, after: str) -> None:
    """Print what changed from one checkpoint to another."""
    (old, had, earlier), (new, has, later) = _read(before), _read(after)
    sys.stdout.write(_heading(before, old, had) + _heading(after, new, has))
    compression_table(earlier.after, later.after, title=f"{before} → {after}").write()
    known = list(earlier.events)
    events = tuple(event for event in later.events if event not in known)
    if events:
        RunReport(earlier.after, later.after, events=events).event_table().write()
    elif has.edit_log == had.edit_log:
        sys.stdout.write("\nno events in between\n")


def report(checkpoint: str, out: str) -> None:
    """Write the report as HTML and JSON."""
    write_report(_read(checkpoint)[2], out)
    sys.stdout.write(f"written: {out}, {Path(out).with_suffix('.json')}\n")


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint of Lightning.

    Raises:
        CommandError: it is damaged, or something else.
    """
    advice = "It is no checkpoint, is damaged, or holds other objects than tensors and plain values."
    with expecting(path, "a checkpoint that `torch.load(..., weights_only=True)` reads", advice):
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        keys = sorted(map(str, found))[:8] if isinstance(found, dict) else type(found).__name__
        raise CommandError(f"`{path}`: expected a checkpoint of Lightning, found no 'state_dict' in it, but {keys}.")
    return found


def _read(path: str) -> tuple[dict[str, Any], Manifest, RunReport]:
    found = read_checkpoint(path)
    with naming_file(path):
        manifest = Manifest.decode(found[KEY]) if KEY in found else Manifest()
        return found, manifest, report_from_checkpoint(found)


def _heading(path: str, found: dict[str, Any], manifest: Manifest) -> str:
    edits = Counter(entry["op"] for entry in manifest.edit_log)
    parts = [
        f"epoch {found.get('epoch', '?')}, step {found.get('global_step', '?')}",
        human_bytes(file_bytes(path)),
        *(f"{plural(count, 'edit')} of {name}" for name, count in edits.items()),
    ]
    return f"{path}: {', '.join(parts) if KEY in found else ', '.join((*parts, 'never compressed'))}\n"


def _claims_table(manifest: Manifest) -> DataTable:
    lines = tuple(
        (method.replace("_", " "), str(len(claim.layers)), _names(claim.layers))
        for method, claim in manifest.owners.items()
    )
    return DataTable(("method", "layers", "names"), lines, text_columns=frozenset({"names"}))


def _names(layers: tuple[str, ...]) -> str:
    more = f", and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    return ", ".join(name or "(model)" for name in layers[:_SHOWN]) + more
