"""`SlimmableTraining`: from the first step on, and beside a teacher from the second epoch on."""

from lightning_light.criteria import Random
from lightning_light.distillation import KnowledgeDistillation, OutputRegression
from lightning_light.slimmable import SlimmableTraining
from tests.contract.bodies import Momentum
from tests.contract.case import Case

CASES = [
    Case(
        "slimmable_training",
        lambda folder: [SlimmableTraining()],
        structural=False,
        no_effect=lambda folder: [SlimmableTraining(start=0.99)],
    ),
    Case(
        "slimmable_training_with_teacher",
        lambda folder: [
            SlimmableTraining(
                [0.5, 1.0],
                random_widths=0,
                loss=OutputRegression(distance="l1"),
                start=1,
                criterion=Random(),
                targets="features.*",
                round_to=2,
            ),
            KnowledgeDistillation("self"),
        ],
        body=Momentum,
        structural=False,
        full=False,
    ),
]
