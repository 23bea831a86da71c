"""Dependency tracing: find coupled channels by following every channel through one forward pass."""

from lightning_light.dependency.groups import ChannelGroup, DependencyGraph, Member
from lightning_light.dependency.step import trace_calls
from lightning_light.dependency.verification import trace_dependencies

__all__ = ["ChannelGroup", "DependencyGraph", "Member", "trace_calls", "trace_dependencies"]
