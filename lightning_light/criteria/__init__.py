"""Criteria: evidence about one weight -> a score of the same shape; the lowest score goes first."""

from lightning_light.criteria.activation import Activation
from lightning_light.criteria.evidence import Criterion, Evidence
from lightning_light.criteria.geometry import GeometricMedian
from lightning_light.criteria.gradient import Hessian, Taylor
from lightning_light.criteria.magnitude import Magnitude
from lightning_light.criteria.norm import BatchNormScale
from lightning_light.criteria.random import Random
from lightning_light.criteria.reduction import Normalizer, Reduction, channel_scores, combine, normalize

__all__ = [
    "Activation",
    "BatchNormScale",
    "Criterion",
    "Evidence",
    "GeometricMedian",
    "Hessian",
    "Magnitude",
    "Normalizer",
    "Random",
    "Reduction",
    "Taylor",
    "channel_scores",
    "combine",
    "normalize",
]
