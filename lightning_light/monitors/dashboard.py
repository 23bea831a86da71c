"""Write to TensorBoard what other loggers cannot show: histograms, heat maps, and a Custom Scalars layout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_light.event_log import event_text
from lightning_light.isolation import isolated
from lightning_light.measure.history import History
from lightning_light.measure.layer_table import layer_weights
from lightning_light.monitors.heat_map import Quantity, heat_map
from lightning_light.monitors.scalars import LAYERS, PREFIX
from lightning_light.targets import inside

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch.utils.tensorboard import SummaryWriter

__all__ = ["add_events", "add_heat_maps", "add_histograms", "add_layout", "read_layout"]

_BINS = 64
_MAX_ROWS = 20  # of a heat map: a card is about 300 pixels wide
_MAX_COUNTED = 1 << 24  # `histc` counts in float32

Layout = Mapping[str, Mapping[str, list[Any]]]


def add_events(writer: SummaryWriter, events: Sequence[Mapping[str, Any]]) -> None:
    """Write what methods have done as text, each event at its step."""
    by_step: dict[int, list[str]] = {}
    for event in events:
        by_step.setdefault(event["step"], []).append(event_text(event))
    for step, lines in by_step.items():
        writer.add_text(f"{PREFIX}/events", "  \n".join(lines), step)


def add_histograms(writer: SummaryWriter, model: nn.Module, layers: Collection[str], step: int) -> None:
    """Write a histogram of each layer's finite weights, under ``compression_layers/weights/<layer>``."""
    with isolated(model):
        for name, module in model.named_modules():
            tensors = [weight.reshape(-1).float().cpu() for weight in layer_weights(module)]
            if not tensors or not inside(name, layers):
                continue
            values = torch.cat(tensors)
            values = values[values.isfinite()]
            if values.numel():
                writer.add_histogram_raw(f"{LAYERS}/weights/{name or 'model'}", **_histogram(values), global_step=step)


def _histogram(values: Tensor) -> dict[str, Any]:
    """Count in bins of equal width, which takes a fraction of the time of ``SummaryWriter.add_histogram``."""
    low, high = (end.item() for end in values.aminmax())
    upper = high if high > low else low + max(abs(low), 1.0) * 1e-6
    parts = torch.split(values, _MAX_COUNTED)
    counts = sum((torch.histc(part, _BINS, low, upper).long() for part in parts), torch.zeros(_BINS, dtype=torch.long))
    return {
        "min": low,
        "max": high,
        "num": values.numel(),
        "sum": values.sum(dtype=torch.float64).item(),
        "sum_squares": values.square().sum(dtype=torch.float64).item(),
        "bucket_limits": torch.linspace(low, upper, _BINS + 1)[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }


def add_heat_maps(writer: SummaryWriter, history: History, step: int) -> None:
    """Write heat maps of the layers that lost most channels or weights, each as soon as some are removed."""
    pictures: dict[Quantity, Sequence[Sequence[float]]] = {"channels": history.channels, "weights": history.weights}
    for quantity, columns in pictures.items():
        if any(fraction != 1.0 for column in columns for fraction in column):
            shown = heat_map(history.of_most_changed(quantity, _MAX_ROWS), quantity)
            writer.add_image(f"{LAYERS}/heat_map/{quantity}", shown, step, dataformats="HWC")


def add_layout(writer: SummaryWriter, folder: str | os.PathLike[str], layout: Layout) -> None:
    """Add ``layout`` to the Custom Scalars layout of a run.

    TensorBoard shows the last layout of a run, so the existing one, of the user or of an earlier fit, is read from the
    run's files and written again with ``layout``.
    """
    writer.flush()
    found = read_layout(folder)
    merged = {**found, **{title: {**found.get(title, {}), **charts} for title, charts in layout.items()}}
    if merged != found:
        writer.add_custom_scalars(merged)


def read_layout(folder: str | os.PathLike[str]) -> dict[str, dict[str, list[Any]]]:
    """Read the layout from a run's event files, as ``SummaryWriter.add_custom_scalars`` takes it; empty if none."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata  # type: ignore[import-untyped]

    tag = metadata.CONFIG_SUMMARY_TAG
    last = None
    for file in sorted(Path(folder).glob("*tfevents*")):
        for record in RawEventFileLoader(str(file)).Load():
            if tag.encode() in record:
                values = Event.FromString(record).summary.value
                last = next((value.tensor.string_val[0] for value in values if value.tag == tag), last)
    if last is None:
        return {}
    categories = layout_pb2.Layout.FromString(last).category
    return {category.title: {chart.title: _chart(chart) for chart in category.chart} for category in categories}


def _chart(chart: Any) -> list[Any]:
    if chart.HasField("margin"):
        names = [name for series in chart.margin.series for name in (series.value, series.lower, series.upper)]
        return ["Margin", names]
    return ["Multiline", list(chart.multiline.tag)]
