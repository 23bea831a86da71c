"""Report a compression run: tables and plots in one HTML file, the same in JSON, and again from a checkpoint."""

from lightning_light.report.checkpoint import report_from_checkpoint
from lightning_light.report.contents import RunReport
from lightning_light.report.environment import describe_environment
from lightning_light.report.figures import report_image
from lightning_light.report.page import render_report, write_report

__all__ = [
    "RunReport",
    "describe_environment",
    "render_report",
    "report_from_checkpoint",
    "report_image",
    "write_report",
]
