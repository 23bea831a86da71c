"""Fewer bits: the network is trained with the rounding of the kernels that will run it."""

from lightning_light.quantization.functional import quantize
from lightning_light.quantization.learned_recipes import LSQ, PACT
from lightning_light.quantization.mixed import Mixed
from lightning_light.quantization.observers import MSE, AtRunTime, MinMax, MovingAverage, Observer, Percentile
from lightning_light.quantization.post_training import AdaRound, BitBudget, Sensitivity, measure_sensitivity
from lightning_light.quantization.quantization_aware_training import QuantizationAwareTraining
from lightning_light.quantization.recipes import Binary, Int8, IntN, Recipe, Ternary
from lightning_light.quantization.state import fake_quantized

__all__ = [
    "AdaRound",
    "AtRunTime",
    "Binary",
    "BitBudget",
    "Int8",
    "IntN",
    "LSQ",
    "MSE",
    "MinMax",
    "Mixed",
    "MovingAverage",
    "Observer",
    "PACT",
    "Percentile",
    "QuantizationAwareTraining",
    "Recipe",
    "Sensitivity",
    "Ternary",
    "fake_quantized",
    "measure_sensitivity",
    "quantize",
]
