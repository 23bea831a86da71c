"""Low rank: layers become factors, with ranks chosen for a budget, and training goes on."""

from lightning_light.lowrank.apply import balance_factors
from lightning_light.lowrank.fits import ActivationSVD, FisherSVD, Fit, WeightSVD, WhitenedSVD
from lightning_light.lowrank.functional import factorize, factorize_checkpoint
from lightning_light.lowrank.low_rank_factorization import LowRankFactorization
from lightning_light.lowrank.ranks import EVBMF, EnergyKept, OutputChange, RankRatio, RankRule
from lightning_light.lowrank.regularize import NuclearNorm, Orthogonality, RankPenalty

__all__ = [  # plain order, capitals or not
    "ActivationSVD",
    "EVBMF",
    "EnergyKept",
    "FisherSVD",
    "Fit",
    "LowRankFactorization",
    "NuclearNorm",
    "Orthogonality",
    "OutputChange",
    "RankPenalty",
    "RankRatio",
    "RankRule",
    "WeightSVD",
    "WhitenedSVD",
    "balance_factors",
    "factorize",
    "factorize_checkpoint",
]
