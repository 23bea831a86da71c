"""`QuantizationAwareTraining`: every stage within twelve steps, for recipes that observe and that learn."""

from typing import Any

from lightning_light.budgets import Channels
from lightning_light.quantization import (
    Int8,
    MovingAverage,
    QuantizationAwareTraining,
    Recipe,
)
from lightning_light.schedules import Linear, Window
from lightning_light.structured import StructuredPruning
from tests.contract.bodies import Momentum
from tests.contract.case import Case

STAGES: dict[str, Any] = {"start": 0.1, "observe_batches": 2, "freeze_observers": 0.7, "freeze_batch_norm": 0.75}


def case(name: str, recipe: Recipe, *, full: bool = False, body: Any = None, **options: Any) -> Case:
    """A row that observes from the third step on, rounds from the fifth, and is frozen from the ninth and tenth."""
    arguments = {**STAGES, **options}
    return Case(
        f"quantization_{name}",
        lambda folder: [QuantizationAwareTraining(recipe, **arguments)],
        no_effect=lambda folder: [QuantizationAwareTraining(Int8(keep_float="*"), **STAGES)],
        structural=False,
        tolerance=0.2,  # after the run the module is float again, and the file is not
        full=full,
        **({"body": body} if body else {}),
    )


CASES = [
    case("int8", Int8(observer=MovingAverage(0.9)), full=True),
    case(
        "x86",
        Int8(engine="x86", keep_float=["head"], observer=MovingAverage(0.9)),
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
            StructuredPruning(Channels(0.5), schedule=Window(Linear(), start=0.0, end=0.3), events=2),
        ],
        tolerance=0.5,
        full=False,
    )
]
