"""`DepthPruning`, on a body with more residual blocks than it needs."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.budgets import MACs
from lightning_light.depth import BlockInfluence, DepthPruning
from lightning_light.quantization import Int8, QuantizationAwareTraining
from lightning_light.schedules import Linear, OneShot, Window
from lightning_light.structured import StructuredPruning
from tests.contract.bodies import Body
from tests.contract.case import Case


class Residual(nn.Module):
    """``relu(x + f(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Deep(Body):
    """Three residual blocks."""

    def make(self) -> None:
        stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.features = nn.Sequential(stem, Residual(), Residual(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(12, 5)


def remove_another(callback: DepthPruning) -> None:
    """Another block than decided is removed."""
    change = callback.change

    def another(*arguments: Any) -> Any:
        plan: Any = callback._last_plan
        plan.removed[:] = [name for name in plan.scores if name not in plan.removed][: len(plan.removed)]
        return change(*arguments)

    callback.change = another  # type: ignore[method-assign]


NO_BLOCKS = dict.fromkeys(  # the bodies of these contracts have no module that is a residual block
    ["manual", "frozen", "tied", "configure_model", "compiled", "wrapped"], "without any of the 0 residual blocks"
)

CASES = [
    Case(
        "depth_pruning",
        lambda folder: [
            DepthPruning(
                MACs(0.5), schedule=Window(Linear(), start=0.2, end=0.7), every_n_steps=3, calibration_batches=2
            )
        ],
        body=Deep,
        no_effect=lambda folder: [DepthPruning(MACs(1.0), schedule=OneShot(at=0.2))],
        plant=remove_another,
        refuses=NO_BLOCKS,
    ),
    Case(
        "depth_pruning_then_channels_and_quantization",
        lambda folder: [
            DepthPruning(MACs(0.7), criterion=BlockInfluence(), schedule=OneShot(at=0.2), calibration_batches=1),
            StructuredPruning(MACs(0.4), schedule=OneShot(at=0.4)),
            QuantizationAwareTraining(Int8(), start=0.6, calibration_batches=2),
        ],
        body=Deep,
        tolerance=2.0,  # after the run the module is float again, but the file is int8
        full=False,
    ),
]
