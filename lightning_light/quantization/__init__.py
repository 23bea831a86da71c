"""Fewer bits: the network is trained with the rounding of the kernels that will run it."""

from lightning_light.quantization.functional import quantize
from lightning_light.quantization.quantization_aware_training import QuantizationAwareTraining
from lightning_light.quantization.recipes import Int8
from lightning_light.quantization.state import fake_quantized

__all__ = ["Int8", "QuantizationAwareTraining", "fake_quantized", "quantize"]
