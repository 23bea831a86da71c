"""Quantization: fewer bits for weights and activations, during training and after it."""

from lightning_light.quantization.checkpoint_state import fake_quantized
from lightning_light.quantization.functional import quantize
from lightning_light.quantization.observers import (
    DynamicObserver,
    MinMax,
    MovingAverage,
    MSEObserver,
    Observer,
    Percentile,
)
from lightning_light.quantization.post_training.refinement import AdaRound
from lightning_light.quantization.post_training.sensitivity import BitBudget, Sensitivity, measure_sensitivity
from lightning_light.quantization.quantization_aware_training import QuantizationAwareTraining
from lightning_light.quantization.recipes import LSQ, PACT, Binary, Int8, IntN, MixedPrecision, Recipe, Ternary

__all__ = [
    "AdaRound",
    "Binary",
    "BitBudget",
    "DynamicObserver",
    "Int8",
    "IntN",
    "LSQ",
    "MSEObserver",
    "MinMax",
    "MixedPrecision",
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
