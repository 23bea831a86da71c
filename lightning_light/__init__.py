"""Neural-network compression methods as PyTorch Lightning callbacks.

Add one to an existing Trainer and train as before:

>>> import lightning_light as ll
>>> ll.StructuredPruning(ll.MACs(0.4), schedule=ll.Window(ll.Cubic(), start=0.2, end=0.7))
StructuredPruning(budget=MACs(remaining=0.4), schedule=Window(schedule=Cubic(), start=0.2, end=0.7))

``ll`` itself has the names that are used most. The others are one level down: ``ll.criteria``, ``ll.schedules``,
``ll.losses``, ``ll.patterns``, ``ll.observers`` and so on. Everything is imported when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_light import (
        budgets as budgets,
        clustering as clustering,
        criteria as criteria,
        depth as depth,
        distillation as distillation,
        errors as errors,
        export as export,
        lowrank as lowrank,
        measure as measure,
        monitors as monitors,
        nas as nas,
        quantization as quantization,
        reparameterization as reparameterization,
        report as report,
        schedules as schedules,
        slimmable as slimmable,
        sparsity as sparsity,
        structured as structured,
        substitution as substitution,
        surgery as surgery,
        targets as targets,
        tuning as tuning,
    )
    from lightning_light.budgets import (
        Channels as Channels,
        Latency as Latency,
        MACs as MACs,
        Params as Params,
        Size as Size,
        Sparsity as Sparsity,
    )
    from lightning_light.callback import CompressionCallback as CompressionCallback
    from lightning_light.clustering import WeightClustering as WeightClustering, cluster as cluster
    from lightning_light.criteria import Magnitude as Magnitude, Taylor as Taylor
    from lightning_light.depth import DepthPruning as DepthPruning, prune_blocks as prune_blocks
    from lightning_light.distillation import (
        CheckpointTeacher as CheckpointTeacher,
        FeatureHint as FeatureHint,
        KnowledgeDistillation as KnowledgeDistillation,
        SelfTeacher as SelfTeacher,
        SoftTargets as SoftTargets,
        losses as losses,
        teachers as teachers,
    )
    from lightning_light.errors import (
        BudgetError as BudgetError,
        LightningLightError as LightningLightError,
        NoEffectWarning as NoEffectWarning,
    )
    from lightning_light.export import (
        ONNX as ONNX,
        ExecuTorch as ExecuTorch,
        MobileExport as MobileExport,
        Tolerance as Tolerance,
        TorchScriptLite as TorchScriptLite,
        export_model as export_model,
        load_exported as load_exported,
    )
    from lightning_light.lowrank import LowRankFactorization as LowRankFactorization, factorize as factorize
    from lightning_light.measure import measure_sparsity as measure_sparsity
    from lightning_light.monitors import (
        CompressionMonitor as CompressionMonitor,
        CompressionReport as CompressionReport,
    )
    from lightning_light.nas import ArchitectureSearch as ArchitectureSearch, search as search
    from lightning_light.planning import plan as plan
    from lightning_light.quantization import (
        LSQ as LSQ,
        Int8 as Int8,
        IntN as IntN,
        MixedPrecision as MixedPrecision,
        QuantizationAwareTraining as QuantizationAwareTraining,
        fake_quantized as fake_quantized,
        measure_sensitivity as measure_sensitivity,
        observers as observers,
        quantize as quantize,
        recipes as recipes,
    )
    from lightning_light.reparameterization import (
        Reparameterization as Reparameterization,
        merge_branches as merge_branches,
    )
    from lightning_light.schedules import Cubic as Cubic, OneShot as OneShot, Window as Window
    from lightning_light.sparsity import (
        NM as NM,
        SRSTE as SRSTE,
        Block as Block,
        DynamicSparseTraining as DynamicSparseTraining,
        RigL as RigL,
        WeightPruning as WeightPruning,
        patterns as patterns,
        prune_weights as prune_weights,
        remove_dead_channels as remove_dead_channels,
    )
    from lightning_light.structured import (
        StructuredPruning as StructuredPruning,
        prune_channels as prune_channels,
        ranking as ranking,
    )
    from lightning_light.substitution import Substitution as Substitution, substitute_operators as substitute_operators
    from lightning_light.surgery import (
        expand_checkpoint as expand_checkpoint,
        load_from_checkpoint as load_from_checkpoint,
        restructure as restructure,
    )
    from lightning_light.targets import Targets as Targets
    from lightning_light.tuning import tune as tune

__version__ = "0.1.0"

_NAMES = {
    "budgets": ("Channels", "Latency", "MACs", "Params", "Size", "Sparsity"),
    "callback": ("CompressionCallback",),
    "clustering": ("WeightClustering", "cluster"),
    "criteria": ("Magnitude", "Taylor"),
    "depth": ("DepthPruning", "prune_blocks"),
    "distillation": ("CheckpointTeacher", "FeatureHint", "KnowledgeDistillation", "SelfTeacher", "SoftTargets"),
    "errors": ("BudgetError", "LightningLightError", "NoEffectWarning"),
    "export": ("ExecuTorch", "MobileExport", "ONNX", "Tolerance", "TorchScriptLite", "export_model", "load_exported"),
    "lowrank": ("LowRankFactorization", "factorize"),
    "measure": ("measure_sparsity",),
    "monitors": ("CompressionMonitor", "CompressionReport"),
    "nas": ("ArchitectureSearch", "search"),
    "planning": ("plan",),
    "reparameterization": ("Reparameterization", "merge_branches"),
    "quantization": (
        "Int8",
        "IntN",
        "LSQ",
        "MixedPrecision",
        "QuantizationAwareTraining",
        "fake_quantized",
        "measure_sensitivity",
        "quantize",
    ),
    "schedules": ("Cubic", "OneShot", "Window"),
    "sparsity": (
        "Block",
        "DynamicSparseTraining",
        "NM",
        "RigL",
        "SRSTE",
        "WeightPruning",
        "prune_weights",
        "remove_dead_channels",
    ),
    "structured": ("StructuredPruning", "prune_channels"),
    "substitution": ("Substitution", "substitute_operators"),
    "surgery": ("expand_checkpoint", "load_from_checkpoint", "restructure"),
    "targets": ("Targets",),
    "tuning": ("tune",),
}
"""Module below this package -> the names that ``lightning_light`` takes from it."""

_MODULES = {name: name for name in (*_NAMES, "report", "slimmable") if name not in ("callback", "planning")} | {
    "losses": "distillation.losses",
    "observers": "quantization.observers",
    "patterns": "sparsity.patterns",
    "ranking": "structured.ranking",
    "recipes": "quantization.recipes",
    "teachers": "distillation.teachers",
}
"""Name of a module in ``lightning_light`` -> its path below this package."""

_HOME = {name: module for module, names in _NAMES.items() for name in names}
_COMMAND_LINES = ("lightning.pytorch.cli", "pytorch_lightning.cli")

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name or module when it is first used (PEP 562)."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List public names and modules, imported or not."""
    return sorted({*globals(), *_HOME, *_MODULES})


class _ImportBeforeCLI:
    """Import all names before LightningCLI is: its short class names are those of subclasses already imported."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> None:
        """Import everything once ``name`` is LightningCLI's module; leave finding modules to the other finders."""
        if name in _COMMAND_LINES:
            sys.meta_path.remove(cls)
            for public in (*_HOME, *_MODULES):
                __getattr__(public)


sys.meta_path.insert(0, _ImportBeforeCLI)
for _loaded in sorted(sys.modules.keys() & set(_COMMAND_LINES))[:1]:
    _ImportBeforeCLI.find_spec(_loaded)
