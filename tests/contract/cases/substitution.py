"""`Substitution`, alone and before other methods under the dense network as teacher."""

from typing import Any

from lightning_light.budgets import MACs, Params
from lightning_light.distillation import KnowledgeDistillation
from lightning_light.quantization import Int8, QuantizationAwareTraining
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning
from lightning_light.substitution import (
    DepthwiseSeparable,
    Fire,
    Ghost,
    GroupShuffle,
    Substitution,
)
from tests.contract.case import Case


def replace_others(callback: Substitution) -> None:
    """Fewer layers than decided are replaced."""
    change = callback.change

    def others(*arguments: Any) -> Any:
        plan: Any = callback.last_plan
        name = next(iter(plan.operators))
        for chosen in (plan.operators, plan.layers):
            del chosen[name]
        return change(*arguments)

    callback.change = others  # type: ignore[method-assign]


CASES = [
    Case(
        "substitution",
        lambda folder: [
            Substitution(
                MACs(0.7),
                operators=[DepthwiseSeparable(), Ghost(ratio=2)],
                start=0.4,
                fit_steps=1,
                calibration_batches=1,
            )
        ],
        no_effect=lambda folder: [Substitution(MACs(1.0), start=0.2)],
        plant=replace_others,
    ),
    Case(
        "substitution_then_channels_and_quantization_under_the_dense_teacher",
        lambda folder: [
            Substitution(
                Params(0.8),
                operators=[GroupShuffle(groups=2), Fire(ratio=0.5)],
                start=0.2,
                fit_steps=1,
                calibration_batches=1,
            ),
            KnowledgeDistillation(teacher="self"),
            StructuredPruning(Params(0.6), schedule=OneShot(at=0.4)),
            QuantizationAwareTraining(Int8(), start=0.6, calibration_batches=2),
        ],
        tolerance=2.0,  # after the run the module is float again, but the file is int8
        full=False,
    ),
]
