"""The table of experiments."""

from dataclasses import dataclass
from typing import Any

import torch_pruning as tp

import lightning_light as ll
from benchmarks.experiments.methods import (
    Callbacks,
    Method,
    PruneChannels,
    PruneUnderLargerTeacher,
    PruneWithinWidths,
    Quantize,
    Student,
)
from benchmarks.experiments.peers import (
    FXQuantization,
    HandWrittenDistillation,
    LightningModelPruning,
    TorchPrune,
    TorchPruning,
)
from lightning_light.criteria import LearnedGates
from lightning_light.nas import ChannelChoices, RankChoices
from lightning_light.reparameterization import ACB
from lightning_light.sparsity import SET
from lightning_light.structured import Widths

OURS, NONE = "lightning_light", "none"
SHORTCUTS = "resnet-shortcuts"
CONVERGED = "cnn-converged"


@dataclass(frozen=True)
class Profile:
    """How much is trained on a kind of machine.

    Attributes:
        depth: of the CIFAR-10 ResNets.
        epochs: by network.
        seeds: by network.
    """

    depth: int
    epochs: dict[str, int]
    seeds: dict[str, int]


PROFILES = {
    "cpu": Profile(
        20,
        {"cnn": 3, CONVERGED: 5, "vit": 3, "resnet": 10, SHORTCUTS: 10},
        {"cnn": 3, CONVERGED: 3, "vit": 3, "resnet": 3, SHORTCUTS: 3},
    ),
    "gpu": Profile(
        56,
        {"cnn": 10, CONVERGED: 10, "vit": 10, "resnet": 200, SHORTCUTS: 200},
        {"cnn": 5, CONVERGED: 5, "vit": 5, "resnet": 3, SHORTCUTS: 3},
    ),
}


@dataclass(frozen=True)
class Experiment:
    """One row of the page.

    Attributes:
        name: of its result files.
        section: of the page.
        title: what is done.
        method: how.
        package: that does it; `NONE` where nothing is compressed.
        beside: the experiments of this package with which the row of a peer is compared.
        network: ``"cnn"``, `CONVERGED`: the CNN after longer training, ``"vit"``, ``"resnet"``, or `SHORTCUTS`: the
            ResNet with convolutional shortcuts.
        epochs: of training; None for those of the profile, 0 for none.
    """

    name: str
    section: str
    title: str
    method: Method
    package: str = OURS
    beside: tuple[str, ...] = ()
    network: str = "cnn"
    epochs: int | None = None


def _ours(name: str, section: str, title: str, *callbacks: ll.CompressionCallback, **options: bool) -> Experiment:
    return Experiment(name, section, title, Callbacks(callbacks, **options))


def _structured(remaining: float) -> list[Experiment]:
    """Return the rows of structured pruning for one budget."""
    section, budget = f"Structured pruning to {remaining:.0%} of the MACs", ll.MACs(remaining)
    end = f"-{remaining}"
    gates = LearnedGates(60)
    return [
        Experiment("magnitude" + end, section, "`Magnitude`, one cut", PruneChannels(budget)),
        Experiment("taylor" + end, section, "`Taylor`, one cut", PruneChannels(budget, ll.Taylor())),
        Experiment("gates" + end, section, "`LearnedGates`, one cut", PruneChannels(budget, gates)),
        Experiment(
            "gates-teacher" + end,
            section,
            "`LearnedGates`, one cut, dense teacher",
            PruneChannels(budget, gates, teacher=True),
        ),
        Experiment(
            "magnitude-teacher" + end,
            section,
            "`Magnitude`, one cut, dense teacher",
            PruneChannels(budget, teacher=True),
        ),
        _ours("magnitude-gradual" + end, section, "`Magnitude`, gradual", ll.StructuredPruning(budget)),
        _ours(
            "taylor-gradual" + end, section, "`Taylor`, gradual", ll.StructuredPruning(budget, criterion=ll.Taylor())
        ),
        Experiment(
            "torch-pruning-magnitude" + end,
            section,
            "`GroupMagnitudeImportance`, one cut",
            TorchPruning(tp.importance.GroupMagnitudeImportance, remaining),
            package="torch-pruning",
            beside=("magnitude" + end, "gates" + end, "gates-teacher" + end),
        ),
        Experiment(
            "torch-pruning-taylor" + end,
            section,
            "`GroupTaylorImportance`, one cut",
            TorchPruning(tp.importance.GroupTaylorImportance, remaining, gradients=True),
            package="torch-pruning",
            beside=("taylor" + end,),
        ),
    ]


_MIDDLE = ["net.blocks.*"]
_SPARSITY = "Sparsity: masked weights"
_FACTORS = "Fewer or lighter layers"
_BITS = "Fewer bits"
_STUDENTS = "A student of half the width, trained from scratch"

CNN = [
    Experiment("dense", "Dense network", "the starting weights of all rows", Method(), NONE, epochs=0),
    Experiment("dense-trained-on", "Dense network", "trained on for as many epochs as the others", Method(), NONE),
    *_structured(0.3),
    *_structured(0.5),
    _ours("sparse-0.9", _SPARSITY, "`WeightPruning`, 90 %, gradual", ll.WeightPruning(ll.Sparsity(0.9))),
    _ours(
        "sparse-one-shot-0.9",
        _SPARSITY,
        "`WeightPruning`, 90 % at the start",
        ll.WeightPruning(ll.Sparsity(0.9), schedule=ll.OneShot()),
    ),
    Experiment(
        "model-pruning-0.9",
        _SPARSITY,
        "`ModelPruning`, 90 % after the first epoch",
        LightningModelPruning(0.9),
        package="Lightning",
        beside=("sparse-0.9",),
    ),
    Experiment(
        "torch-prune-0.9",
        _SPARSITY,
        "`global_unstructured`, 90 % at the start",
        TorchPrune(0.9),
        package="torch.nn.utils.prune",
        beside=("sparse-one-shot-0.9",),
    ),
    _ours(
        "rigl-0.9",
        _SPARSITY,
        "`DynamicSparseTraining`, RigL, 90 %",
        ll.DynamicSparseTraining(ll.Sparsity(0.9), criterion=ll.Magnitude()),
    ),
    _ours(
        "set-0.9",
        _SPARSITY,
        "`DynamicSparseTraining`, SET, 90 %",
        ll.DynamicSparseTraining(ll.Sparsity(0.9), method=SET(), criterion=ll.Magnitude()),
    ),
    _ours("nm-2-4", _SPARSITY, "`WeightPruning`, 2:4", ll.WeightPruning(pattern=ll.NM(2, 4), targets=_MIDDLE)),
    _ours("sr-ste", _SPARSITY, "`SRSTE`, 2:4", ll.SRSTE(ll.NM(2, 4), targets=_MIDDLE)),
    _ours(
        "block-0.75",
        _SPARSITY,
        "`WeightPruning`, blocks of 4 outputs, 75 %",
        ll.WeightPruning(ll.Sparsity(0.75), pattern=ll.Block(4, 1), targets=_MIDDLE),
    ),
    _ours(
        "low-rank-0.5",
        _FACTORS,
        "`LowRankFactorization`, spatial, 50 % of the MACs",
        ll.LowRankFactorization(ll.MACs(0.5), form="spatial"),
    ),
    _ours("depth-0.5", _FACTORS, "`DepthPruning`, 50 % of the MACs", ll.DepthPruning(ll.MACs(0.5))),
    _ours("substitution-0.5", _FACTORS, "`Substitution`, 50 % of the MACs", ll.Substitution(ll.MACs(0.5))),
    _ours(
        "search-0.5",
        _FACTORS,
        "`ArchitectureSearch`, widths and ranks, 50 % of the MACs, dense teacher",
        ll.ArchitectureSearch(ll.MACs(0.5), space=[ChannelChoices(), RankChoices()]),
        teacher=True,
    ),
    _ours("acb", _FACTORS, "`Reparameterization`, ACB, merged", ll.Reparameterization(ACB())),
    _ours("clustering-16", _BITS, "`WeightClustering`, 16 values per layer", ll.WeightClustering(16)),
    Experiment("ptq", _BITS, "`quantize`, int8, after training on", Quantize(ll.Int8("onnx"))),
    _ours(
        "qat", _BITS, "`QuantizationAwareTraining`, int8", ll.QuantizationAwareTraining(ll.Int8("onnx")), quantized=True
    ),
    Experiment(
        "fx-qat",
        _BITS,
        "FX, `prepare_qat_fx`, int8",
        FXQuantization(),
        package="torch.ao.quantization",
        beside=("qat",),
    ),
    _ours(
        "lsq-4",
        _BITS,
        "`LSQ`, 4-bit weights and activations, first and last layer int8",
        ll.QuantizationAwareTraining(
            ll.MixedPrecision(default=ll.LSQ(4, 4, engine="onnx"), first=ll.Int8("onnx"), last=ll.Int8("onnx")),
            start=0.2,
        ),
        quantized=True,
    ),
    _ours(
        "prune-qat-teacher",
        _BITS,
        "gradual pruning to 50 % of the MACs, then int8, dense teacher",
        ll.StructuredPruning(ll.MACs(0.5)),
        ll.QuantizationAwareTraining(ll.Int8("onnx")),
        teacher=True,
        quantized=True,
    ),
    Experiment("student", _STUDENTS, "alone", Student(12)),
    Experiment("student-teacher", _STUDENTS, "`KnowledgeDistillation`", Student(12, teacher=True)),
    Experiment(
        "student-by-hand",
        _STUDENTS,
        "distillation loss in `training_step`",
        HandWrittenDistillation(12),
        package="by hand",
        beside=("student-teacher",),
    ),
]


_TRAINED = "CNN trained for 20 epochs: structured pruning to 30% of the MACs"


def _converged(name: str, title: str, method: Method, package: str = OURS, **options: Any) -> Experiment:
    return Experiment(f"{CONVERGED}-{name}", _TRAINED, title, method, package, network=CONVERGED, **options)


_THIRTY = ll.MACs(0.3)
_EVEN = Widths(min_remaining=0.4)
_RECIPES = tuple(f"{CONVERGED}-{name}-0.3" for name in ("magnitude-teacher", "gates-teacher", "gates-widths-teacher"))

CONVERGED_CNN = [
    _converged("dense", "the starting weights of all rows", Method(), NONE, epochs=0),
    _converged("dense-trained-on", "trained on for as many epochs as the others", Method(), NONE),
    _converged("magnitude-0.3", "`Magnitude`, one cut", PruneChannels(_THIRTY)),
    _converged("magnitude-teacher-0.3", "`Magnitude`, one cut, dense teacher", PruneChannels(_THIRTY, teacher=True)),
    _converged("taylor-0.3", "`Taylor`, one cut", PruneChannels(_THIRTY, ll.Taylor())),
    _converged("gates-0.3", "`LearnedGates`, one cut", PruneChannels(_THIRTY, LearnedGates())),
    _converged(
        "gates-teacher-0.3",
        "`LearnedGates`, one cut, dense teacher",
        PruneChannels(_THIRTY, LearnedGates(), teacher=True),
    ),
    _converged(
        "gates-widths-teacher-0.3",
        "`LearnedGates`, `min_remaining=0.4`, one cut, dense teacher",
        PruneWithinWidths(_THIRTY, LearnedGates(), teacher=True, widths=_EVEN),
    ),
    _converged("magnitude-gradual-0.3", "`Magnitude`, gradual", Callbacks([ll.StructuredPruning(_THIRTY)])),
    _converged(
        "taylor-gradual-0.3",
        "`Taylor`, gradual",
        Callbacks([ll.StructuredPruning(_THIRTY, criterion=ll.Taylor())]),
    ),
    _converged(
        "torch-pruning-magnitude-0.3",
        "`GroupMagnitudeImportance`, one cut",
        TorchPruning(tp.importance.GroupMagnitudeImportance, 0.3),
        "torch-pruning",
        beside=_RECIPES,
    ),
    _converged(
        "torch-pruning-taylor-0.3",
        "`GroupTaylorImportance`, one cut",
        TorchPruning(tp.importance.GroupTaylorImportance, 0.3, gradients=True),
        "torch-pruning",
        beside=_RECIPES[1:],
    ),
]


def _untrained(remaining: float, name: str, criterion: ll.criteria.Criterion) -> Experiment:
    """Return a row of a ResNet that is pruned and not trained."""
    section = f"ResNet, CIFAR-10: pruned to {remaining:.0%} of the MACs, no training"
    method = PruneChannels(ll.MACs(remaining), criterion)
    title = f"`{type(criterion).__name__}`, statistics of batch norms corrected"
    return Experiment(f"resnet-{name}-untrained-{remaining}", section, title, method, network="resnet", epochs=0)


_RESNET = "ResNet, CIFAR-10: trained on"

RESNET = [
    Experiment("resnet-dense", _RESNET, "the published weights", Method(), NONE, network="resnet", epochs=0),
    *(
        _untrained(remaining, name, criterion)
        for remaining in (0.5, 0.3)
        for name, criterion in (("magnitude", ll.Magnitude()), ("gates", LearnedGates()))
    ),
    Experiment(
        "resnet-gates-teacher-0.5",
        _RESNET,
        "`LearnedGates`, one cut to 50 % of the MACs, dense teacher",
        PruneChannels(ll.MACs(0.5), LearnedGates(), teacher=True),
        network="resnet",
    ),
    Experiment(
        "resnet-gates-larger-teacher-0.5",
        _RESNET,
        "`LearnedGates`, one cut to 50 % of the MACs, ResNet-56 as teacher",
        PruneUnderLargerTeacher(ll.MACs(0.5), LearnedGates()),
        network="resnet",
    ),
    Experiment(
        "resnet-magnitude-teacher-0.5",
        _RESNET,
        "`Magnitude`, one cut to 50 % of the MACs, dense teacher",
        PruneChannels(ll.MACs(0.5), teacher=True),
        network="resnet",
    ),
]

_HALF = "ResNet with convolutional shortcuts, CIFAR-10: pruned to 50% of the MACs, trained on"


def _half(name: str, title: str, method: Method, **options: Any) -> Experiment:
    """Return a row of the ResNet that every package can prune."""
    return Experiment(f"{SHORTCUTS}-{name}-0.5", _HALF, title, method, network=SHORTCUTS, **options)


RESNET_SHORTCUTS = [
    Experiment(
        f"{SHORTCUTS}-dense", _HALF, "dense network, the published weights", Method(), NONE, network=SHORTCUTS, epochs=0
    ),
    _half(
        "gates-teacher",
        "`LearnedGates`, one cut, dense teacher",
        PruneChannels(ll.MACs(0.5), LearnedGates(), teacher=True),
    ),
    _half(
        "torch-pruning-magnitude",
        "`GroupMagnitudeImportance`, one cut",
        TorchPruning(tp.importance.GroupMagnitudeImportance, 0.5),
        package="torch-pruning",
        beside=(f"{SHORTCUTS}-gates-teacher-0.5",),
    ),
    _half(
        "torch-pruning-taylor",
        "`GroupTaylorImportance`, one cut",
        TorchPruning(tp.importance.GroupTaylorImportance, 0.5, gradients=True),
        package="torch-pruning",
        beside=(f"{SHORTCUTS}-gates-teacher-0.5",),
    ),
    _half("gates", "`LearnedGates`, one cut", PruneChannels(ll.MACs(0.5), LearnedGates())),
    _half("magnitude", "`Magnitude`, one cut", PruneChannels(ll.MACs(0.5))),
]

_VIT = "Vision transformer, Fashion-MNIST: "
_VIT_DENSE, _VIT_PRUNED = f"{_VIT}dense network", f"{_VIT}structured pruning to 60% of the MACs"
_VIT_OTHERS = f"{_VIT}masks, factors, int8"


def _vit(name: str, title: str, method: Method, section: str = _VIT_PRUNED, **options: Any) -> Experiment:
    return Experiment(f"vit-{name}", section, title, method, network="vit", **options)


_SIXTY = ll.MACs(0.6)

VIT = [
    _vit("dense", "the starting weights of all rows", Method(), _VIT_DENSE, package=NONE, epochs=0),
    _vit("dense-trained-on", "trained on for as many epochs as the others", Method(), _VIT_DENSE, package=NONE),
    _vit("magnitude-0.6", "`Magnitude`, one cut", PruneChannels(_SIXTY)),
    _vit("taylor-0.6", "`Taylor`, one cut", PruneChannels(_SIXTY, ll.Taylor())),
    _vit("gates-0.6", "`LearnedGates`, one cut", PruneChannels(_SIXTY, LearnedGates(60))),
    _vit(
        "gates-teacher-0.6",
        "`LearnedGates`, one cut, dense teacher",
        PruneChannels(_SIXTY, LearnedGates(60), teacher=True),
    ),
    _vit(
        "torch-pruning-magnitude-0.6",
        "`GroupMagnitudeImportance`, one cut",
        TorchPruning(tp.importance.GroupMagnitudeImportance, 0.6),
        package="torch-pruning",
        beside=("vit-magnitude-0.6", "vit-gates-0.6"),
    ),
    _vit(
        "torch-pruning-taylor-0.6",
        "`GroupTaylorImportance`, one cut",
        TorchPruning(tp.importance.GroupTaylorImportance, 0.6, gradients=True),
        package="torch-pruning",
        beside=("vit-taylor-0.6",),
    ),
    _vit("sparse-0.9", "`WeightPruning`, 90 %, gradual", Callbacks([ll.WeightPruning(ll.Sparsity(0.9))]), _VIT_OTHERS),
    _vit(
        "low-rank-0.5",
        "`LowRankFactorization`, 50 % of the MACs",
        Callbacks([ll.LowRankFactorization(ll.MACs(0.5))]),
        _VIT_OTHERS,
    ),
    _vit(
        "qat",
        "`QuantizationAwareTraining`, int8",
        Callbacks([ll.QuantizationAwareTraining(ll.Int8("onnx"))], quantized=True),
        _VIT_OTHERS,
    ),
]

EXPERIMENTS = [*CNN, *CONVERGED_CNN, *VIT, *RESNET, *RESNET_SHORTCUTS]
