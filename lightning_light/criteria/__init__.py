"""Criteria: evidence about one weight -> a score of the same shape; the lowest score goes first."""

from lightning_light.criteria.activation import Activation, Wanda
from lightning_light.criteria.evidence import Criterion, Evidence
from lightning_light.criteria.geometry import GeometricMedian
from lightning_light.criteria.gradient import SNIP, Hessian, Taylor
from lightning_light.criteria.magnitude import Magnitude
from lightning_light.criteria.movement import Movement, SoftMovement
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
    "Movement",
    "Normalizer",
    "Random",
    "Reduction",
    "SNIP",
    "SoftMovement",
    "Taylor",
    "Wanda",
    "channel_scores",
    "combine",
    "normalize",
]
