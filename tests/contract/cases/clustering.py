"""`WeightClustering`: every way of training and both granularities."""

from typing import Any

from lightning_light.budgets import Sparsity
from lightning_light.clustering import DKM, StraightThroughEstimator, WeightClustering
from lightning_light.quantization import Int8, MovingAverage, QuantizationAwareTraining
from lightning_light.schedules import OneShot
from lightning_light.sparsity import WeightPruning
from lightning_light.targets import Targets
from tests.contract.bodies import Momentum
from tests.contract.case import Case


def case(name: str, clusters: int = 8, *, full: bool = False, body: Any = None, **options: Any) -> Case:
    """A row in which weights share values from the sixth step on."""
    arguments = {"start": 0.4, **options}
    return Case(
        f"clustering_{name}",
        lambda folder: [WeightClustering(clusters, **arguments)],
        structural=False,
        no_effect=lambda folder: [WeightClustering(targets=Targets(types="BatchNorm2d"))],
        full=full,
        **({"body": body} if body else {}),
    )


CASES = [
    case("centroids", full=True),
    case("straight_through", training=StraightThroughEstimator(), granularity="channel", full=True),
    case("dkm", 4, training=DKM(), targets="features.conv*", body=Momentum),
    case("density", 16, initialization="density", preserve_sparsity=False, start=1, body=Momentum),
]

CASES += [
    Case(
        "clustering_between_pruning_and_quantization",
        lambda folder: [
            WeightPruning(Sparsity(0.5), schedule=OneShot(at=0.1)),
            WeightClustering(8, start=0.35, training=StraightThroughEstimator()),
            QuantizationAwareTraining(Int8(observer=MovingAverage(0.9)), start=0.6, calibration_batches=2),
        ],
        structural=False,
        tolerance=0.5,  # after the run the module is float again, and the file is not
        full=False,
    )
]
