"""Monitor a compression run: curves, tables, pictures. A monitor changes nothing in the network."""

from lightning_light.measure.comparison import compression_table
from lightning_light.measure.history import History
from lightning_light.measure.snapshot import Snapshot, take_snapshot
from lightning_light.monitors.compression_monitor import CompressionMonitor
from lightning_light.monitors.compression_report import CompressionReport
from lightning_light.monitors.heat_map import heat_map
from lightning_light.report.figures import report_image

__all__ = [
    "CompressionMonitor",
    "CompressionReport",
    "History",
    "Snapshot",
    "compression_table",
    "heat_map",
    "report_image",
    "take_snapshot",
]
