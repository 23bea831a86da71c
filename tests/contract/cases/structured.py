"""`StructuredPruning`: every criterion, ranking and kind of budget at least once."""

from dataclasses import replace
from typing import Any

from lightning_light.budgets import Channels, MACs, Params, Size
from lightning_light.criteria import (
    SNIP,
    Activation,
    BatchNormScale,
    GeometricMedian,
    Hessian,
    LearnedGates,
    Magnitude,
    Movement,
    Random,
    SoftMovement,
    Taylor,
    Wanda,
)
from lightning_light.schedules import Linear, OneShot, Window
from lightning_light.structured import (
    Global,
    GroupLasso,
    GrowingRegularization,
    Isomorphic,
    Local,
    Sensitivity,
    StructuredPruning,
    Widths,
)
from lightning_light.targets import Targets
from tests.contract.bodies import Momentum
from tests.contract.case import Case

THREE_CUTS: dict[str, Any] = {"schedule": Window(Linear(), start=0.1, end=0.75), "every_n_steps": 3}


def keep_the_others(pruning: StructuredPruning) -> None:
    """Keep other channels of every layer than the other ranks, and as many."""
    decide = pruning._decide

    def otherwise(*arguments: Any) -> Any:
        plan = decide(*arguments)
        return replace(plan, kept={name: mask.flip(0) for name, mask in plan.kept.items()})

    pruning._decide = otherwise  # type: ignore[method-assign]


def case(name: str, budget: Any = None, *, full: bool = False, body: Any = None, **options: Any) -> Case:
    """A row in which channels are removed three times, between the second step and the ninth."""
    arguments = {**THREE_CUTS, **options}
    return Case(
        f"structured_{name}",
        lambda folder: [StructuredPruning(budget, **arguments)],
        no_effect=lambda folder: [StructuredPruning(Channels(1.0), **THREE_CUTS)],
        plant=keep_the_others,
        full=full,
        **({"body": body} if body else {}),
    )


CASES = [
    case("magnitude", MACs(0.5), full=True),
    case("taylor", Params(0.5), criterion=Taylor(), ranking=Local(), calibration_batches=2, full=True),
    case("hessian", MACs(0.6), criterion=Hessian(), ranking=Isomorphic(), calibration_batches=3),
    case("activation", Channels(0.7), criterion=Activation(), calibration_batches=2, targets="features.conv*"),
    case("batch_norm_scale", Size("9 kB"), criterion=BatchNormScale(), targets=Targets(exclude="features.last")),
    case("geometric_median", Channels(0.5), criterion=GeometricMedian(), widths=Widths(round_to=2), body=Momentum),
    case("random", MACs(0.5), criterion=Random(), ranking=Global("max", None)),
    case("remaining", remaining={"features.conv1": 0.5, "features.last": 0.75}, criterion=Magnitude(1.0)),
    case("wanda", MACs(0.6), criterion=Wanda(), calibration_batches=2),
    case("snip", MACs(0.6), criterion=SNIP(), calibration_batches=2, correct_batch_norm=False),
    case("movement", MACs(0.6), criterion=Movement(), calibration_batches=2),
    case("soft_movement", MACs(0.6), criterion=SoftMovement(), calibration_batches=2, body=Momentum),
    case("learned_gates", MACs(0.6), criterion=LearnedGates(steps=2, lr=0.5)),
    case("sensitivity", MACs(0.6), ranking=Sensitivity(widths=3, batches=2)),
    case(
        "group_lasso",
        MACs(0.5),
        regularizer=GroupLasso(0.01),
        ranking=Global(),
        calibration_batches=2,
        widths=Widths(min_remaining=0.2),
        full=True,
    ),
    case(
        "growing_regularization",
        Params(0.6),
        regularizer=GrowingRegularization(0.01),
        schedule=OneShot(at=0.4),
        body=Momentum,
    ),
]
