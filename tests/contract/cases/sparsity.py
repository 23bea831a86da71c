"""`WeightPruning`, `SRSTE` and `DynamicSparseTraining`: every method, pattern, scope and criterion at least once."""

from typing import Any

from lightning_light.budgets import Sparsity
from lightning_light.criteria import SNIP, Hessian, Magnitude, Movement, Random, SoftMovement, Taylor, Wanda
from lightning_light.schedules import Constant, Cosine, Cubic, Exponential, Linear, OneShot, Staircase, Window
from lightning_light.sparsity import (
    NM,
    SET,
    SRSTE,
    Alternating,
    Block,
    Column,
    DenseSparseDense,
    DynamicSparseTraining,
    Filter,
    Kernel,
    Rewinding,
    RigL,
    Row,
    SRigL,
    Static,
    WeightPruning,
)
from lightning_light.targets import Targets
from tests.contract.bodies import Momentum
from tests.contract.case import Case

GRADUAL: dict[str, Any] = {"schedule": Window(Cubic(), start=0.1, end=0.75), "every_n_steps": 2}
MOST = Sparsity(0.7)
FITTING = Targets(exclude="*.stem")  # its three inputs do not divide by four


def pruning(name: str, budget: Any = MOST, *, full: bool = False, body: Any = None, **options: Any) -> Case:
    """A row in which weights are masked between the second step and the ninth."""
    arguments = {**GRADUAL, **options}
    return Case(
        f"weight_pruning_{name}",
        lambda folder: [WeightPruning(budget, **arguments)],
        structural=False,
        no_effect=lambda folder: [WeightPruning(Sparsity(0.0), **GRADUAL)],
        full=full,
        **({"body": body} if body else {}),
    )


def sr_ste(name: str, pattern: NM, *, full: bool = False, body: Any = None, **options: Any) -> Case:
    """A row in which N:M masks are selected again after every step."""
    arguments = {"targets": FITTING, "schedule": Window(Cubic(), start=0.1, end=0.75), **options}
    return Case(
        f"sr_ste_{name}",
        lambda folder: [SRSTE(pattern, **arguments)],
        structural=False,
        no_effect=lambda folder: [SRSTE(pattern, **{**arguments, "schedule": Constant(0.0)})],
        full=full,
        **({"body": body} if body else {}),
    )


def dynamic(
    name: str,
    method: Any,
    *,
    full: bool = False,
    body: Any = None,
    start: int | float = 0.0,
    end: int | float = 0.75,
    **options: Any,
) -> Case:
    """A row in which connections are replaced at every second step until the ninth."""
    refuses = {} if isinstance(method, Static) else {"frozen": "expected trainable weights, found frozen ones"}
    arguments = {"method": method, "schedule": Window(Cosine(), start, end), "every_n_steps": 2, **options}
    return Case(
        f"dynamic_{name}",
        lambda folder: [DynamicSparseTraining(Sparsity(0.7), **arguments)],
        structural=False,
        no_effect=lambda folder: [DynamicSparseTraining(Sparsity(0.0), method=method, scope="local")],
        refuses=refuses,
        full=full,
        **({"body": body} if body else {}),
    )


CASES = [
    pruning("global", full=True),
    pruning("momentum", scope="erk", criterion=Magnitude(1.0), body=Momentum, full=True),
    pruning("lamp", scope="lamp"),
    pruning("local", scope="local", schedule=Window(Linear(), start=0.0, end=0.9)),
    pruning("one_shot", schedule=OneShot(at=0.4), scope="local", remaining={"head": 0.8, "features.conv1": 0.1}),
    pruning("remaining", None, remaining={"features.*": 0.5}),
    pruning("nm", None, pattern=NM(2, 4), targets=FITTING, body=Momentum),
    pruning("nm_1_4", None, pattern=NM(1, 4), targets=FITTING, criterion=Taylor(), calibration_batches=1),
    pruning("default_events", every_n_steps=None),
    sr_ste("2_4", NM(2, 4), full=True),
    sr_ste("1_4", NM(1, 4), body=Momentum),
    sr_ste("one_shot", NM(2, 4), schedule=OneShot(), decay=0.0),
    pruning("block", pattern=Block(4, 1), targets="features.*"),
    pruning("filter", Sparsity(0.4), pattern=Filter(), targets="features.*"),
    pruning("kernel", pattern=Kernel(), scope="lamp"),
    pruning("row", pattern=Row(), scope="erk"),
    pruning("column", pattern=Column(), scope="local"),
    pruning("movement", criterion=Movement()),
    pruning("soft_movement", criterion=SoftMovement(), body=Momentum),
    pruning("snip", criterion=SNIP(), schedule=OneShot(), calibration_batches=2),
    pruning("taylor", criterion=Taylor(), calibration_batches=2),
    pruning("hessian", criterion=Hessian(), calibration_batches=3, scope="local"),
    pruning("wanda", criterion=Wanda(), calibration_batches=2, scope="local"),
    pruning("random", criterion=Random(3), seed=5),
    pruning("alternating", schedule=Alternating(phases=2, start=0.1, end=0.8), body=Momentum),
    pruning("dense_sparse_dense", Sparsity(0.3), schedule=DenseSparseDense(0.2, 0.7)),
    pruning(
        "rewinding",
        Sparsity(0.9),
        schedule=Rewinding(Window(Staircase(Exponential(2.302585), steps=3), start=0.2, end=0.9), rewind_to=0.1),
    ),
    pruning("rewinding_to_start", schedule=Rewinding(OneShot(at=0.5), rewind_to=0.0), body=Momentum),
    dynamic("set", SET(), scope="local"),
    dynamic("rigl", RigL(), full=True),
    dynamic("rigl_momentum", RigL(0.5), body=Momentum, start=0.2, end=0.9, scope="local"),
    dynamic("rigl_trained", RigL(), criterion=Magnitude(), scope="global", start=1, end=3),
    dynamic("srigl", SRigL(), body=Momentum),
    dynamic("srigl_ablating", SRigL(fraction=0.9, min_salient=0.9)),
    dynamic("static", Static(), seed=3),
]
