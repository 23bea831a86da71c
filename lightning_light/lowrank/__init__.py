"""Low-rank factorization: replace layers by factors whose ranks fit a budget."""

from lightning_light.lowrank.apply import balance_factors
from lightning_light.lowrank.fits import ActivationSVD, FisherSVD, Fit, WeightSVD, WhitenedSVD
from lightning_light.lowrank.functional import factorize, factorize_checkpoint
from lightning_light.lowrank.low_rank_factorization import LowRankFactorization
from lightning_light.lowrank.options import FactorizationOptions, RankAllocation
from lightning_light.lowrank.plan import FactorizationPlan
from lightning_light.lowrank.ranks import EVBMF, OutputChange, RankRatio, RankRule, RetainedEnergy
from lightning_light.lowrank.regularize import NuclearNorm, Orthogonality, RankRegularizer

__all__ = [  # plain order, capitals or not
    "ActivationSVD",
    "EVBMF",
    "FactorizationOptions",
    "FactorizationPlan",
    "FisherSVD",
    "Fit",
    "LowRankFactorization",
    "NuclearNorm",
    "Orthogonality",
    "OutputChange",
    "RankAllocation",
    "RankRatio",
    "RankRegularizer",
    "RankRule",
    "RetainedEnergy",
    "WeightSVD",
    "WhitenedSVD",
    "balance_factors",
    "factorize",
    "factorize_checkpoint",
]
