"""`QuantizationAwareTraining`: every stage within twelve steps, for recipes that observe and that learn."""

from typing import Any

from lightning_light.budgets import Channels, MACs, Sparsity
from lightning_light.distillation import FeatureHint, KnowledgeDistillation, SoftTargets
from lightning_light.lowrank import LowRankFactorization, RankAllocation
from lightning_light.quantization import (
    LSQ,
    PACT,
    Int8,
    IntN,
    MinMax,
    MixedPrecision,
    MovingAverage,
    MSEObserver,
    QuantizationAwareTraining,
    Recipe,
)
from lightning_light.schedules import Linear, OneShot, Staircase, Window
from lightning_light.sparsity import WeightPruning
from lightning_light.structured import StructuredPruning
from tests.contract.bodies import Momentum
from tests.contract.case import Case
from tests.contract.cases.distillation import MENTOR

STAGES: dict[str, Any] = {"start": 0.1, "calibration_batches": 2, "freeze_observers": 0.7, "freeze_batch_norm": 0.75}


def case(
    name: str, recipe: Recipe, *, full: bool = False, body: Any = None, tolerance: float = 0.2, **options: Any
) -> Case:
    """A row that observes from the third step on, quantizes from the fifth, and is frozen from the ninth and tenth."""
    arguments = {**STAGES, **options}
    return Case(
        f"quantization_{name}",
        lambda folder: [QuantizationAwareTraining(recipe, **arguments)],
        no_effect=lambda folder: [QuantizationAwareTraining(Int8(exclude="*"), **STAGES)],
        structural=False,
        tolerance=tolerance,  # after the run the module is float again, and the file is not
        full=full,
        **({"body": body} if body else {}),
    )


BIT_WIDTHS = Window(Staircase(Linear(), steps=2), end=0.6)

LSQ_WITH_INT8_ENDS = MixedPrecision(default=LSQ(dampening=0.1), first=Int8(), last=Int8())

CASES = [
    case("int8", Int8(observer=MovingAverage(0.9)), full=True),
    case("lsq", LSQ_WITH_INT8_ENDS, full=True, tolerance=3.0),
    case("lsq_plus", LSQ(8, 8, offset=True), body=Momentum, tolerance=1.0),
    case("w4a4", IntN(4, 4, observer=MSEObserver(momentum=0.5)), bit_width_schedule=BIT_WIDTHS, tolerance=1.0),
    case("pact", PACT(), bit_width_schedule=BIT_WIDTHS, body=Momentum, tolerance=1.0),
    case("minmax", Int8(observer=MinMax())),
    case(
        "x86",
        Int8(engine="x86", exclude=["head"], observer=MovingAverage(0.9)),
        start=1,
        freeze_observers=2,
        body=Momentum,
    ),
]

CASES += [
    Case(
        "quantization_after_pruning",
        lambda folder: [
            QuantizationAwareTraining(Int8(observer=MovingAverage(0.9)), **{**STAGES, "start": 0.4}),
            StructuredPruning(Channels(0.5), schedule=Window(Linear(), start=0.0, end=0.3), every_n_steps=2),
        ],
        tolerance=0.5,
        full=False,
    ),
    Case(
        "quantization_chain",  # everything there is, one after the other, under a teacher with a projector
        lambda folder: [
            KnowledgeDistillation(teacher=MENTOR, losses=[SoftTargets(), FeatureHint(feature_layers="features.conv1")]),
            StructuredPruning(Channels(0.75), schedule=OneShot(at=0.1)),
            WeightPruning(Sparsity(0.4), schedule=OneShot(at=0.25)),
            LowRankFactorization(MACs(0.4), schedule=OneShot(at=0.4), allocation=RankAllocation(round_to=2)),
            QuantizationAwareTraining(LSQ_WITH_INT8_ENDS, **{**STAGES, "start": 0.5}),
        ],
        tolerance=5.0,
        refuses={
            "second_fit": r"`weight_pruning` on `features.conv1.0`: expected a layer that no other method works on"
        },
    ),
]
