"""Operator substitution: lighter operators in the place of convolutions, chosen under a budget."""

from lightning_light.substitution.candidates import Candidate
from lightning_light.substitution.functional import substitute_operators
from lightning_light.substitution.operators import (
    DepthwiseSeparable,
    Fire,
    Ghost,
    GroupShuffle,
    InvertedResidual,
    Operator,
)
from lightning_light.substitution.options import SubstitutionOptions
from lightning_light.substitution.plan import SubstitutionPlan
from lightning_light.substitution.substitution import Substitution

__all__ = [
    "Candidate",
    "DepthwiseSeparable",
    "Fire",
    "Ghost",
    "GroupShuffle",
    "InvertedResidual",
    "Operator",
    "Substitution",
    "SubstitutionOptions",
    "SubstitutionPlan",
    "substitute_operators",
]
