"""What the package promises: the names of `lightning_light`, and that they are the ones the wings list."""

import importlib
from pathlib import Path

import pytest

import lightning_light

ROOT = Path(lightning_light.__file__).parent
FACES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))

PUBLIC = [
    "Activation",
    "AttentionTransfer",
    "BatchNormScale",
    "Budget",
    "BudgetError",
    "ChannelWise",
    "Channels",
    "CheckpointTeacher",
    "CompressibleMixin",
    "CompressionCallback",
    "CompressionMonitor",
    "Constant",
    "ContrastiveHint",
    "Cosine",
    "Criterion",
    "Cubic",
    "DIST",
    "DKD",
    "DistillationLoss",
    "Exponential",
    "Exporter",
    "FactoryTeacher",
    "Falling",
    "FeatureHint",
    "FeatureLoss",
    "FileTeacher",
    "GeometricMedian",
    "Global",
    "GroupLasso",
    "GrowingRegularization",
    "Hessian",
    "Isomorphic",
    "KnowledgeDistillation",
    "Latency",
    "LightningLightError",
    "Linear",
    "Local",
    "LogitStandardization",
    "MACs",
    "Magnitude",
    "ManifestError",
    "MobileExport",
    "NoEffectWarning",
    "OneShot",
    "OrderError",
    "OutputRegression",
    "Params",
    "ParityError",
    "RKD",
    "Random",
    "RankMismatchError",
    "Ranking",
    "SRD",
    "Schedule",
    "SelfTeacher",
    "SimilarityPreserving",
    "Size",
    "SoftTargets",
    "Sparsity",
    "SparsityLearning",
    "Staircase",
    "StructuredPruning",
    "SurgeryError",
    "TargetError",
    "Targets",
    "Taylor",
    "TeacherSource",
    "Tolerance",
    "TorchScriptLite",
    "TraceError",
    "UnsupportedError",
    "Window",
    "expand_checkpoint",
    "export_model",
    "load_from_checkpoint",
    "prune_channels",
]


def test_the_public_names_are_these() -> None:
    assert lightning_light.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_has_a_docstring(name: str) -> None:
    assert (getattr(lightning_light, name).__doc__ or "").strip()


@pytest.mark.parametrize("face", ["", *FACES])
def test_a_face_lists_names_that_exist_in_order(face: str) -> None:
    module = importlib.import_module(f"lightning_light.{face}".rstrip("."))
    names = list(getattr(module, "__all__", []))
    assert names == sorted(names)
    assert [name for name in names if not hasattr(module, name)] == []
