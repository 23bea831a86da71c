"""`KnowledgeDistillation`: every kind of teacher and every loss at least once, alone and beside other methods."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_light.budgets import Channels, Sparsity
from lightning_light.distillation import (
    DIST,
    DKD,
    RKD,
    SRD,
    AttentionTransfer,
    ChannelWise,
    ContrastiveHint,
    Decreasing,
    DistillationLoss,
    FactoryTeacher,
    FeatureHint,
    KnowledgeDistillation,
    KnowledgeReview,
    LogitStandardization,
    OnlineTeacher,
    OutputRegression,
    SelfTeacher,
    SimilarityPreserving,
    SoftTargets,
    TeacherCache,
)
from lightning_light.quantization import Int8, MovingAverage, QuantizationAwareTraining
from lightning_light.schedules import Linear, OneShot, Window
from lightning_light.sparsity import WeightPruning
from lightning_light.structured import StructuredPruning
from tests.contract.bodies import Features, Momentum
from tests.contract.case import Case


class Mentor(nn.Module):
    """A network with the student's paths; whoever makes it, the same weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.features, self.head = Features(), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


HINT = "features.conv1"
MENTOR = FactoryTeacher(f"{__name__}.Mentor")


def case(name: str, *losses: DistillationLoss, full: bool = False, body: Any = None, **options: Any) -> Case:
    """A row with `Mentor` as the teacher, unless ``options`` name another."""
    arguments = {"teacher": MENTOR, **options, **({"losses": list(losses)} if losses else {})}
    return Case(
        f"distillation_{name}",
        lambda folder: [KnowledgeDistillation(**_placed(arguments, folder))],
        structural=False,
        no_effect=lambda folder: [KnowledgeDistillation(MENTOR, stop=0.0)],
        full=full,
        **({"body": body} if body else {}),
    )


def beside(name: str, other: Callable[[], Any], *losses: DistillationLoss, **options: Any) -> Case:
    """A row with another method below it, which begins in the fifth step."""
    return Case(
        f"distillation_{name}",
        lambda folder: [KnowledgeDistillation(losses=list(losses), **options), other()],
        structural=other is cutting,
        tolerance=0.2 if other is rounding else 1e-4,  # after the run the module is float again, and the file is not
        full=False,
    )


def cutting() -> Any:
    """The student's channels leave."""
    return StructuredPruning(Channels(0.5), schedule=OneShot(at=0.4))


def masking() -> Any:
    """The student's weights become zero."""
    return WeightPruning(Sparsity(0.7), schedule=Window(Linear(), start=0.4, end=0.8), every_n_steps=2)


def rounding() -> Any:
    """The student's layers are observed, then fake-quantized."""
    return QuantizationAwareTraining(
        Int8(observer=MovingAverage(0.9)),
        start=0.1,
        calibration_batches=2,
        freeze_observers=0.7,
        freeze_batch_norm=0.75,
    )


def _placed(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    if "cache_file" not in arguments:
        return arguments
    kept = {name: value for name, value in arguments.items() if name != "cache_file"}
    return {**kept, "cache": TeacherCache(str(folder / arguments["cache_file"]), half_precision=True)}


CASES = [
    case("soft_targets", full=True),
    case("projector", SoftTargets(), FeatureHint(feature_layers=HINT), full=True),
    case("self", teacher="self", full=True),
    case("average", teacher=SelfTeacher(decay=0.9)),
    case("two_teachers", LogitStandardization(), DKD(), teacher=[MENTOR, SelfTeacher()], teacher_weights=[0.7, 0.3]),
    case("memory", DIST(), cache=TeacherCache(), body=Momentum),
    case("files", cache_file="outputs"),
    case(
        "matched",
        AttentionTransfer(feature_layers="auto"),
        SRD(feature_layers=HINT),
        ContrastiveHint(feature_layers=HINT),
    ),
    case("relations", RKD(), SimilarityPreserving(feature_layers=HINT), ChannelWise(feature_layers=HINT), stop=0.8),
    case("balanced", SoftTargets(schedule=Decreasing(Linear())), OutputRegression(), balance_every_n_steps=2),
    case("review", KnowledgeReview(feature_layers=["features.bn0", "features.bn2", "features.last"])),
    case("exits", FeatureHint(feature_layers={"features.bn0": "features.bn2"}), teacher=OnlineTeacher()),
    beside("pruned_hint", cutting, FeatureHint(feature_layers=HINT), teacher=MENTOR),
    beside("pruned_self", cutting, SoftTargets(), FeatureHint(feature_layers="features.last"), teacher="self"),
    beside("pruned_average", cutting, SoftTargets(), FeatureHint(feature_layers=HINT), teacher=SelfTeacher(decay=0.9)),
    beside("pruned_exits", cutting, FeatureHint(feature_layers={HINT: "features.last"}), teacher=OnlineTeacher()),
    beside("masked_self", masking, SoftTargets(), FeatureHint(feature_layers=HINT), teacher="self"),
    beside("masked_average", masking, SoftTargets(), teacher=SelfTeacher(decay=0.9)),
    beside("rounded_self", rounding, SoftTargets(), FeatureHint(feature_layers=HINT), teacher="self"),
    beside("rounded_hint", rounding, SoftTargets(), FeatureHint(feature_layers="features.last"), teacher=MENTOR),
    beside("rounded_average", rounding, SoftTargets(), teacher=SelfTeacher(decay=0.9)),
]
