"""What the package promises: the names of `lightning_light`, and that they are the ones the wings list."""

import importlib
from pathlib import Path

import pytest

import lightning_light

ROOT = Path(lightning_light.__file__).parent
FACES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))

PUBLIC = [
    "Activation",
    "Alternating",
    "AttentionTransfer",
    "BatchNormScale",
    "Block",
    "Budget",
    "BudgetError",
    "ChannelWise",
    "Channels",
    "CheckpointTeacher",
    "Column",
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
    "DenseSparseDense",
    "DistillationLoss",
    "DynamicMethod",
    "DynamicSparseTraining",
    "ExecuTorch",
    "Exponential",
    "Exporter",
    "FactoryTeacher",
    "Falling",
    "FeatureHint",
    "FeatureLoss",
    "FileTeacher",
    "Filter",
    "GeometricMedian",
    "Global",
    "GroupLasso",
    "GrowingRegularization",
    "Hessian",
    "Int8",
    "Isomorphic",
    "Kernel",
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
    "Movement",
    "NM",
    "NoEffectWarning",
    "ONNX",
    "OneShot",
    "OrderError",
    "OutputRegression",
    "Params",
    "ParityError",
    "Pattern",
    "QuantizationAwareTraining",
    "RKD",
    "Random",
    "RankMismatchError",
    "Ranking",
    "Rewinding",
    "RigL",
    "Row",
    "SET",
    "SNIP",
    "SRD",
    "SRigL",
    "Schedule",
    "SelfTeacher",
    "SimilarityPreserving",
    "Size",
    "SoftMovement",
    "SoftTargets",
    "Sparsity",
    "SparsityLearning",
    "Staircase",
    "Static",
    "StructuredPruning",
    "SurgeryError",
    "TargetError",
    "Targets",
    "Taylor",
    "TeacherSource",
    "Tolerance",
    "TorchScriptInt8",
    "TorchScriptLite",
    "TraceError",
    "Unstructured",
    "UnsupportedError",
    "Wanda",
    "WeightPruning",
    "Window",
    "Zeros",
    "expand_checkpoint",
    "export_model",
    "fake_quantized",
    "load_from_checkpoint",
    "measure_zeros",
    "prune_channels",
    "prune_weights",
    "quantize",
    "remove_dead_channels",
    "to_semi_structured",
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
