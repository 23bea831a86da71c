"""Slimmable training: one network that runs at several widths."""

from lightning_light.slimmable.extraction import extract_width
from lightning_light.slimmable.slimmable_training import SlimmableTraining

__all__ = ["SlimmableTraining", "extract_width"]
