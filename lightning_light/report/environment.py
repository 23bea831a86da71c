"""Describe where and how a run took place: versions, machine, seed, command, peak memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from typing import Any

import torch

from lightning_light.measure.latency import processor

__all__ = ["describe_environment"]

_PACKAGES = ("lightning-light", "torch", "lightning", "pytorch-lightning", "executorch", "onnxruntime")


def describe_environment() -> dict[str, Any]:
    """Return versions, machine, threads, seed and command of this process, and its peak memory in bytes.

    Example:
        >>> found = describe_environment()
        >>> sorted(found)
        ['command', 'date', 'machine', 'packages', 'peak_memory', 'python', 'seed', 'threads']
        >>> found["peak_memory"]["resident"] > 1e6
        True
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "seed": os.environ.get("PL_GLOBAL_SEED", "not set by `seed_everything`"),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "machine": f"{platform.platform()}, {os.cpu_count()} CPUs ({processor()})",
        "threads": torch.get_num_threads(),
        "peak_memory": _peak_memory(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _peak_memory() -> dict[str, int]:
    """Return the peak of resident memory, where the system counts it, and of the memory allocated on each GPU."""
    found: dict[str, int] = {}
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["resident"] = peak if sys.platform == "darwin" else 1024 * peak
    if torch.cuda.is_available():
        found |= {f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
    return found
