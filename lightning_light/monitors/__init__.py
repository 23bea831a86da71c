"""Monitor a compression run: curves, tables, pictures. A monitor changes nothing in the network."""

from lightning_light.monitors.compression_monitor import CompressionMonitor
from lightning_light.monitors.heat_map import heat_map
from lightning_light.monitors.history import History
from lightning_light.monitors.report_image import report_image
from lightning_light.monitors.snapshot import Snapshot, take_snapshot
from lightning_light.monitors.table import compression_markdown, compression_table

__all__ = [
    "CompressionMonitor",
    "History",
    "Snapshot",
    "compression_markdown",
    "compression_table",
    "heat_map",
    "report_image",
    "take_snapshot",
]
