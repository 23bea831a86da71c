"""`LowRankFactorization`: every form, fit, rule and kind of budget at least once."""

from typing import Any

from lightning_light.budgets import MACs, Params, Size
from lightning_light.lowrank import (
    EVBMF,
    ActivationSVD,
    FisherSVD,
    LowRankFactorization,
    NuclearNorm,
    Orthogonality,
    RankAllocation,
    RankRatio,
    RetainedEnergy,
    WhitenedSVD,
)
from lightning_light.quantization import Int8, MovingAverage, QuantizationAwareTraining
from lightning_light.schedules import Linear, OneShot, Window
from lightning_light.structured import StructuredPruning
from lightning_light.targets import Targets
from tests.contract.bodies import Momentum
from tests.contract.case import Case


def case(name: str, budget: Any, *, full: bool = False, body: Any = None, **options: Any) -> Case:
    """Make a row in which layers are factorized before the sixth step, unless it has a schedule of its own."""
    arguments = {"schedule": OneShot(at=0.4), "allocation": RankAllocation(round_to=2), **options}
    return Case(
        f"low_rank_{name}",
        lambda folder: [LowRankFactorization(budget, **arguments)],
        no_effect=lambda folder: [LowRankFactorization(MACs(1.0))],
        full=full,
        **({"body": body} if body else {}),
    )


CASES = [
    case("macs", MACs(0.5), full=True),
    case(
        "gradual",
        MACs(0.4),
        schedule=Window(Linear(), start=0.1, end=0.75),
        every_n_steps=3,
        allocation=RankAllocation(round_to=1),
        full=True,
    ),
    case("whitened", Params(0.6), fit=WhitenedSVD(), calibration_batches=2, full=True),
    case("activation", MACs(0.6), fit=ActivationSVD(), calibration_batches=3, form="channel"),
    case("fisher", MACs(0.6), fit=FisherSVD(), calibration_batches=2, body=Momentum),
    case("size", Size("11 kB"), form="spatial", regularizer=NuclearNorm(1e-3)),
    case("energy", RetainedEnergy(0.8), form="tucker2", regularizer=Orthogonality(1e-3), body=Momentum),
    case("ratio", RankRatio(0.3), targets=Targets(include="features.*", exclude="features.stem")),
    case("evbmf", EVBMF(), form="channel"),
    case("epoch", MACs(0.7), schedule=Window(OneShot(), start=1, end=2), targets=["features.conv1", "features.last"]),
]

CASES += [
    Case(
        "low_rank_between_pruning_and_quantization",
        lambda folder: [
            StructuredPruning(MACs(0.7), schedule=OneShot(at=0.1)),
            LowRankFactorization(MACs(0.6), schedule=OneShot(at=0.35), allocation=RankAllocation(round_to=1)),
            QuantizationAwareTraining(Int8(observer=MovingAverage(0.9)), start=0.6, calibration_batches=2),
        ],
        tolerance=0.5,  # after the run the module is float again, but the file is int8
        full=False,
    )
]
