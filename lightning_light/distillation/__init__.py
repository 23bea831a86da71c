"""A teacher: the network learns from what another one says, and from what it sees on the way."""

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
from lightning_light.distillation.knowledge_distillation import KnowledgeDistillation
from lightning_light.distillation.logits import DIST, DKD, LogitStandardization, SoftTargets
from lightning_light.distillation.loss import Decreasing, DistillationLoss, FeatureLoss
from lightning_light.distillation.teachers import (
    CheckpointTeacher,
    FactoryTeacher,
    FileTeacher,
    LiveTeacher,
    SelfTeacher,
    TeacherSource,
)

__all__ = [  # plain order, capitals or not
    "AttentionTransfer",
    "ChannelWise",
    "CheckpointTeacher",
    "ContrastiveHint",
    "DIST",
    "DKD",
    "DistillationLoss",
    "FactoryTeacher",
    "Decreasing",
    "FeatureHint",
    "FeatureLoss",
    "FileTeacher",
    "KnowledgeDistillation",
    "KnowledgeReview",
    "LiveTeacher",
    "LogitStandardization",
    "OutputRegression",
    "RKD",
    "SRD",
    "SelfTeacher",
    "SimilarityPreserving",
    "SoftTargets",
    "TeacherSource",
]
