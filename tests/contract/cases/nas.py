"""`ArchitectureSearch`, on a body with residual blocks, and on one that is quantized afterwards."""

from functools import partial
from typing import Any

from lightning_light.budgets import MACs, Params
from lightning_light.distillation import KnowledgeDistillation
from lightning_light.nas import ArchitectureSearch, BlockChoices, ChannelChoices, RankChoices
from lightning_light.quantization import Int8, QuantizationAwareTraining
from lightning_light.schedules import Linear, OneShot, Window
from tests.contract.case import Case
from tests.contract.cases.depth import Deep

SPACE = [BlockChoices(), ChannelChoices((0.5,)), RankChoices((0.5,))]
SMALL: dict[str, Any] = {"calibration_batches": 1, "evaluation_batches": 1, "evaluations": 1}


def choose_another(callback: ArchitectureSearch) -> None:
    """Other blocks than decided are removed."""
    change = callback.change

    def another(trainer: Any, pl_module: Any, carry_out: Any, *others: Any, **kept: Any) -> Any:
        model, plan = carry_out.args
        if carry_out.func.__self__.kind == "blocks":
            plan = [f"features.{number}" for number in (1, 2, 3) if f"features.{number}" not in plan][: len(plan)]
        return change(trainer, pl_module, partial(carry_out.func, model, plan), *others, **kept)

    callback.change = another  # type: ignore[method-assign]


NO_BLOCKS = dict.fromkeys(  # the bodies of these contracts have no module that is a residual block
    ["manual", "frozen", "tied", "configure_model", "compiled", "wrapped"], "expected at least one choice, found no"
)

CASES = [
    Case(
        "architecture_search",
        lambda folder: [ArchitectureSearch(MACs(0.4), schedule=OneShot(at=0.3), space=[BlockChoices()], **SMALL)],
        body=Deep,
        no_effect=lambda folder: [
            ArchitectureSearch(MACs(1.0), schedule=OneShot(at=0.2), space=[BlockChoices()], **SMALL)
        ],
        plant=choose_another,
        refuses=NO_BLOCKS,
    ),
    Case(
        "architecture_search_of_all_kinds_with_teacher_and_quantization",
        lambda folder: [
            ArchitectureSearch(
                [MACs(0.4), Params(0.5)], schedule=Window(Linear(), start=0.25, end=0.55), space=SPACE, **SMALL
            ),
            KnowledgeDistillation(teacher="self"),
            QuantizationAwareTraining(Int8(), start=0.6, calibration_batches=2),
        ],
        body=Deep,
        tolerance=2.0,  # after the run the module is float again, but the file is int8
        full=False,
    ),
]
