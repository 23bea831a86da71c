"""Coupling: which channels of a network hang together, found by following every channel through one forward pass."""

from lightning_light.coupling.groups import ChannelGroup, Coupling, Member
from lightning_light.coupling.verify import couple_channels

__all__ = ["ChannelGroup", "Coupling", "Member", "couple_channels"]
