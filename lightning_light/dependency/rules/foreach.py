"""Rules for operations on lists of tensors, by which optimizers and averages of parameters work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_light.dependency.context import TraceContext
from lightning_light.dependency.rules.table import elementwise, rule

__all__: list[str] = []


@rule(
    *(f"_foreach_{name}{place}" for name in ("add", "sub", "mul", "div", "lerp", "addcmul") for place in ("", "_")),
    "_foreach_copy_",
)
def _foreach(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Couple the tensors at the same place of every list, position by position."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    for tensors in zip(*lists, args[0] if out is None else out, strict=True):
        elementwise(context, name, tensors[:-1], {}, tensors[-1])
