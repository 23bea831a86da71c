"""All distillation losses: ``ll.losses``."""

from lightning_light.distillation.features import (
    RKD,
    SRD,
    AttentionTransfer,
    ChannelWise,
    ContrastiveHint,
    FeatureHint,
    KnowledgeReview,
    OutputRegression,
    SimilarityPreserving,
)
from lightning_light.distillation.logits import DIST, DKD, LogitStandardization, SoftTargets
from lightning_light.distillation.loss import Decreasing, DistillationLoss, FeatureLoss

__all__ = [
    "AttentionTransfer",
    "ChannelWise",
    "ContrastiveHint",
    "DIST",
    "DKD",
    "Decreasing",
    "DistillationLoss",
    "FeatureHint",
    "FeatureLoss",
    "KnowledgeReview",
    "LogitStandardization",
    "OutputRegression",
    "RKD",
    "SRD",
    "SimilarityPreserving",
    "SoftTargets",
]
