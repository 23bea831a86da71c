"""Recipes: how many bits, for what, and by whose rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_light.targets import Targets

__all__ = ["Engine", "Int8"]

Engine = Literal["qnnpack", "x86"]

_WEIGHT_LIMIT = {"qnnpack": 127, "x86": 63}


@dataclass(frozen=True)
class Int8:
    """Eight bits as the int8 kernels of mobile and server CPUs compute with them.

    Weights are symmetric, one scale an output channel: ``q = round(w / s)`` in [-127, 127], ``s = max|w| / 127``; zero
    stays zero, so masks survive. Activations are affine, one scale a tensor: ``q = round(x / s) + z`` in [0, 255],
    with ``s`` and ``z`` from a moving average of the smallest and largest value of each training batch.

    Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    https://arxiv.org/abs/1712.05877

    Example:
        >>> Int8(engine="x86", keep_float=["head"])
        Int8(engine='x86', keep_float=['head'])

    Args:
        engine: whose rules. ``qnnpack`` (ARM): weights in [-127, 127]. ``x86``: weights in [-63, 63], because without
            VNNI its kernels add two products in 16 bits, and 2 * 255 * 127 does not fit.
        keep_float: layers that stay float: patterns or `Targets`; the first or the last, for instance.
        averaging: weight of a new batch in the moving average of the ranges, in (0, 1].

    Raises:
        ValueError: an argument out of range.
    """

    engine: Engine = "qnnpack"
    keep_float: Targets | str | list[str] | None = None
    averaging: float = 0.01

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise ValueError(
                f"`Int8(engine={self.engine!r})`: expected one of {list(get_args(Engine))}. For phones write 'qnnpack'."
            )
        if not 0.0 < self.averaging <= 1.0:
            raise ValueError(
                f"`Int8(averaging={self.averaging})`: expected 0 < averaging <= 1, the share of a new batch. "
                "Usual is 0.01."
            )

    def __repr__(self) -> str:
        """The call that makes an equal recipe."""
        given = [(name, getattr(self, name), field.default) for name, field in self.__dataclass_fields__.items()]
        return f"Int8({', '.join(f'{name}={value!r}' for name, value, default in given if value != default)})"

    @property
    def weight_limit(self) -> int:
        """The largest quantized weight; the smallest is its negative."""
        return _WEIGHT_LIMIT[self.engine]
