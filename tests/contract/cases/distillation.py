"""`KnowledgeDistillation`: every kind of teacher and every loss at least once, alone and beside pruning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_light.budgets import Channels
from lightning_light.distillation import (
    DIST,
    DKD,
    RKD,
    SRD,
    AttentionTransfer,
    ChannelWise,
    ContrastiveHint,
    DistillationLoss,
    FactoryTeacher,
    Falling,
    FeatureHint,
    KnowledgeDistillation,
    LogitStandardization,
    OutputRegression,
    SelfTeacher,
    SimilarityPreserving,
    SoftTargets,
)
from lightning_light.schedules import Linear, OneShot
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
        no_effect=lambda folder: [KnowledgeDistillation(teacher=MENTOR, stop=0.0)],
        full=full,
        **({"body": body} if body else {}),
    )


def beside_pruning(name: str, *losses: DistillationLoss, **options: Any) -> Case:
    """A row in which the student's channels leave in the fifth step."""
    build: Callable[[Path], list[Any]] = lambda folder: [  # noqa: E731  # its twin above is one, too
        KnowledgeDistillation(losses=list(losses), **options),
        StructuredPruning(Channels(0.5), schedule=OneShot(at=0.4)),
    ]
    return Case(f"distillation_pruned_{name}", build, full=False)


def _placed(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {**arguments, "cache": str(folder / "answers")} if arguments.get("cache") == "files" else arguments


CASES = [
    case("soft_targets", full=True),
    case("projector", SoftTargets(), FeatureHint(taps=HINT), full=True),
    case("self", teacher="self", full=True),
    case("average", teacher=SelfTeacher(decay=0.9)),
    case("two_teachers", LogitStandardization(), DKD(), teacher=[MENTOR, SelfTeacher()], teacher_weights=[0.7, 0.3]),
    case("memory", DIST(), cache="memory", body=Momentum),
    case("files", cache="files", cache_half=True),
    case("matched", AttentionTransfer(taps="auto"), SRD(taps=HINT), ContrastiveHint(taps=HINT)),
    case("relations", RKD(), SimilarityPreserving(taps=HINT), ChannelWise(taps=HINT), stop=0.8),
    case("balanced", SoftTargets(schedule=Falling(Linear())), OutputRegression(), balance_every=2),
    beside_pruning("hint", FeatureHint(taps=HINT), teacher=MENTOR),
    beside_pruning("self", SoftTargets(), FeatureHint(taps="features.last")),
    beside_pruning("average", SoftTargets(), teacher=SelfTeacher(decay=0.9)),
]
