"""The command line of Lightning: the LightningCLI of the host to which a module belongs."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_light.host.classes import loaded_hosts

__all__ = ["lightning_cli_of"]


def lightning_cli_of(module_class: Any) -> type:
    """Return LightningCLI of the host of a module class or function; of the first loaded host for others."""
    hosts = loaded_hosts()
    bases = getattr(module_class, "__mro__", ())
    near = next((host for base in bases for host in hosts if base.__module__.startswith(f"{host}.")), hosts[0])
    found: type = importlib.import_module(f"{near}.cli").LightningCLI
    return found
