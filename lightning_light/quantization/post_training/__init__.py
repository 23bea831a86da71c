"""Fewer bits without training: everything is decided from a few batches of inputs."""

from lightning_light.quantization.post_training.adaround import AdaRound
from lightning_light.quantization.post_training.bits import BitBudget
from lightning_light.quantization.post_training.sensitivity import Sensitivity, measure_sensitivity

__all__ = ["AdaRound", "BitBudget", "Sensitivity", "measure_sensitivity"]
