"""Surgery: change shapes and modules of a live network, and let everything that refers to it follow."""

from lightning_light.surgery.attachment import attach
from lightning_light.surgery.checkpoint import CompressibleMixin, load_from_checkpoint, manifest_of, restructure
from lightning_light.surgery.edit import Edit, cut
from lightning_light.surgery.expand import expand_checkpoint

__all__ = [
    "CompressibleMixin",
    "Edit",
    "attach",
    "cut",
    "expand_checkpoint",
    "load_from_checkpoint",
    "manifest_of",
    "restructure",
]
