"""Knowledge distillation: losses over outputs and features of a teacher."""

from lightning_light.distillation.batch_fields import BatchFields
from lightning_light.distillation.cache import TeacherCache
from lightning_light.distillation.knowledge_distillation import KnowledgeDistillation
from lightning_light.distillation.losses import (
    DIST,
    DKD,
    RKD,
    SRD,
    AttentionTransfer,
    ChannelWise,
    ContrastiveHint,
    Decreasing,
    DistillationLoss,
    FeatureHint,
    FeatureLoss,
    KnowledgeReview,
    LogitStandardization,
    OutputRegression,
    SimilarityPreserving,
    SoftTargets,
)
from lightning_light.distillation.teachers import (
    BuiltTeacher,
    CheckpointTeacher,
    FactoryTeacher,
    FileTeacher,
    OnlineTeacher,
    SelfTeacher,
    TeacherSource,
)

__all__ = [  # plain order, capitals or not
    "AttentionTransfer",
    "BatchFields",
    "BuiltTeacher",
    "ChannelWise",
    "CheckpointTeacher",
    "ContrastiveHint",
    "DIST",
    "DKD",
    "Decreasing",
    "DistillationLoss",
    "FactoryTeacher",
    "FeatureHint",
    "FeatureLoss",
    "FileTeacher",
    "KnowledgeDistillation",
    "KnowledgeReview",
    "LogitStandardization",
    "OnlineTeacher",
    "OutputRegression",
    "RKD",
    "SRD",
    "SelfTeacher",
    "SimilarityPreserving",
    "SoftTargets",
    "TeacherCache",
    "TeacherSource",
]
