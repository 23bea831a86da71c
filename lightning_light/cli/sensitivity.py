"""Measure how sensitive the layers of a checkpoint are to quantization."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from lightning_light.atomic import atomic_write
from lightning_light.cli.errors import as_command_error
from lightning_light.cli.modules import batches_of, load_module
from lightning_light.criteria.output_distance import Distance
from lightning_light.formatting import DataTable, human_count, plural
from lightning_light.quantization import measure_sensitivity

__all__ = ["sensitivity"]

_MEASURES: dict[Distance, str] = {
    "kl": "KL divergence of the class scores",
    "mse": "squared error relative to the variance",
}


def sensitivity(
    checkpoint: str,
    module: str,
    data: str | None,
    batches: int,
    bits: Sequence[int],
    distance: Distance,
    out: str | None,
) -> None:
    """Print the sensitivity of each layer, the most sensitive first, and write it as JSON."""
    network = load_module(checkpoint, module)
    given = batches_of(network, checkpoint, data, batches)
    with as_command_error():
        found = measure_sensitivity(network, data=given, bits=tuple(bits), distance=distance)
    lines = tuple(
        (layer, human_count(found.weights[layer]), *(f"{found.distances[layer][width]:.3g}" for width in found.widths))
        for layer in found.most_sensitive(len(found.distances))
    )
    headers = ("layer", "weights", *(f"{width} bits" for width in found.widths))
    notes = (
        f"{_MEASURES[distance]} when the weight of one layer is quantized, mean of {plural(len(given), 'batch')}",
        f"the most sensitive at {found.widths[0]} bits first",
    )
    DataTable(headers, lines, notes=notes, droppable=("weights",)).write()
    if out is not None:
        with atomic_write(out) as part:
            part.write_text(json.dumps(found.rows(), indent=1))
        sys.stdout.write(f"written: {out}\n")
