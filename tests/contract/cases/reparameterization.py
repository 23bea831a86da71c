"""`Reparameterization`: every form, with and without merging, alone and in chains."""

from dataclasses import replace
from typing import Any

from lightning_light.budgets import MACs, Sparsity
from lightning_light.distillation import KnowledgeDistillation, SoftTargets
from lightning_light.quantization import Int8, MovingAverage, QuantizationAwareTraining
from lightning_light.reparameterization import ACB, DBB, OREPA, Branches, Reparameterization, RepVGG
from lightning_light.schedules import Linear, OneShot, Window
from lightning_light.sparsity import WeightPruning
from lightning_light.structured import StructuredPruning
from lightning_light.targets import Targets
from tests.contract.bodies import Momentum
from tests.contract.case import Case
from tests.contract.cases.distillation import MENTOR


def expand_fewer(callback: Reparameterization) -> None:
    """One convolution less than decided is expanded."""
    plan_all = callback._plan

    def fewer(*arguments: Any) -> Any:
        plan = plan_all(*arguments)
        return replace(plan, layers=dict(list(plan.layers.items())[1:]))

    callback._plan = fewer  # type: ignore[method-assign]


def case(name: str, form: Any, *, full: bool = False, body: Any = None, **options: Any) -> Case:
    """A row in which convolutions are expanded before the third step and merged before the ninth."""
    arguments = {"start": 0.2, "merge": 0.7, **options}
    return Case(
        f"reparameterization_{name}",
        lambda folder: [Reparameterization(form, **arguments)],
        no_effect=lambda folder: [Reparameterization(form, targets="head")],
        plant=expand_fewer,
        full=full,
        **({"body": body} if body else {}),
    )


CASES = [
    case("acb", ACB(), full=True),
    case("branches", Branches(3), merge=None, full=True),
    case("dbb", DBB(), body=Momentum),
    case("orepa", OREPA(), merge=None),
    case("repvgg", RepVGG(), start=1, merge=2, targets=Targets(exclude="features.stem"), body=Momentum),
    Case(
        "reparameterization_then_pruning_and_quantization",
        lambda folder: [
            Reparameterization(ACB()),
            KnowledgeDistillation(teacher=MENTOR, losses=[SoftTargets(temperature=4.0)]),
            StructuredPruning(MACs(0.7), schedule=OneShot(at=0.2)),
            WeightPruning(Sparsity(0.5), schedule=Window(Linear(), start=0.4, end=0.5)),
            QuantizationAwareTraining(Int8(observer=MovingAverage(0.9)), start=0.6, calibration_batches=2),
        ],
        tolerance=0.5,  # after the run the module is float again, but the file is int8
        full=False,
    ),
]
