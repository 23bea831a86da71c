"""Neural-network compression as PyTorch Lightning callbacks.

Add one to a Trainer that you have, and train as before:

>>> import lightning_light as ll
>>> ll.StructuredPruning(ll.MACs(0.4), schedule=ll.Window(ll.Cubic(), start=0.2, end=0.7))
StructuredPruning(budget=MACs(remaining=0.4), schedule=Window(schedule=Cubic(), start=0.2, end=0.7))
"""

from lightning_light.budgets import Budget, Channels, Latency, MACs, Params, Size, Sparsity
from lightning_light.callback import CompressionCallback
from lightning_light.criteria import (
    Activation,
    BatchNormScale,
    Criterion,
    GeometricMedian,
    Hessian,
    Magnitude,
    Random,
    Taylor,
)
from lightning_light.errors import (
    BudgetError,
    LightningLightError,
    ManifestError,
    NoEffectWarning,
    OrderError,
    ParityError,
    RankMismatchError,
    SurgeryError,
    TargetError,
    TraceError,
    UnsupportedError,
)
from lightning_light.export import Exporter, MobileExport, Tolerance, TorchScriptLite, export_model
from lightning_light.monitors import CompressionMonitor
from lightning_light.schedules import (
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    OneShot,
    Schedule,
    Staircase,
    Window,
)
from lightning_light.structured import (
    Global,
    GroupLasso,
    GrowingRegularization,
    Isomorphic,
    Local,
    Ranking,
    SparsityLearning,
    StructuredPruning,
    prune_channels,
)
from lightning_light.surgery import CompressibleMixin, expand_checkpoint, load_from_checkpoint
from lightning_light.targets import Targets

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "BatchNormScale",
    "Budget",
    "BudgetError",
    "Channels",
    "CompressibleMixin",
    "CompressionCallback",
    "CompressionMonitor",
    "Constant",
    "Cosine",
    "Criterion",
    "Cubic",
    "Exponential",
    "Exporter",
    "GeometricMedian",
    "Global",
    "GroupLasso",
    "GrowingRegularization",
    "Hessian",
    "Isomorphic",
    "Latency",
    "LightningLightError",
    "Linear",
    "Local",
    "MACs",
    "Magnitude",
    "ManifestError",
    "MobileExport",
    "NoEffectWarning",
    "OneShot",
    "OrderError",
    "Params",
    "ParityError",
    "Random",
    "RankMismatchError",
    "Ranking",
    "Schedule",
    "Size",
    "Sparsity",
    "SparsityLearning",
    "Staircase",
    "StructuredPruning",
    "SurgeryError",
    "TargetError",
    "Targets",
    "Taylor",
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
