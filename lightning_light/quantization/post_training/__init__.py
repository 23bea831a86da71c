"""Fewer bits without training: everything is decided from a few batches of inputs."""

from lightning_light.quantization.post_training.adaround import AdaRound

__all__ = ["AdaRound"]
