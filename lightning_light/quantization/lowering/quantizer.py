"""The fake quantizer that a network gets: exporters find it in the compression state, and lower the network by it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from typing_extensions import override

from lightning_light.int8 import LoweredModel, QDQConstraints, Quantizer
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.lowering.base import lowered
from lightning_light.quantization.lowering.qdq import QDQLowering
from lightning_light.quantization.lowering.quantized_ops import QuantizedOpsLowering, quantized_engine

__all__ = ["LoweringQuantizer"]


class LoweringQuantizer(FakeQuantizer, Quantizer):
    """A `FakeQuantizer` that exporters can lower to int8 operators of a runtime."""

    @override
    def quantized_ops(self, call: Callable[[], Any], engine: str) -> AbstractContextManager[LoweredModel]:
        return quantized_engine(self, lowered(self, call, QuantizedOpsLowering(self, engine)), engine)

    @override
    def qdq(self, call: Callable[[], Any], constraints: QDQConstraints) -> AbstractContextManager[LoweredModel]:
        return lowered(self, call, QDQLowering(self, constraints))
