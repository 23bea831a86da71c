"""Post-training quantization: calibration, equalization, rounding, bias correction, sensitivity."""

from lightning_light.quantization.post_training.adaround import AdaRound
from lightning_light.quantization.post_training.bit_allocation import BitBudget
from lightning_light.quantization.post_training.sensitivity import Sensitivity, measure_sensitivity

__all__ = ["AdaRound", "BitBudget", "Sensitivity", "measure_sensitivity"]
