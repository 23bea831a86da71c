"""Frozen networks that a module only trains with are left alone by masks, clusters, factors and budgets, and named."""

import re
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_light.budgets import Params, Size, Sparsity
from lightning_light.clustering import WeightClustering, cluster
from lightning_light.criteria import Taylor
from lightning_light.errors import BudgetError, NoEffectWarning
from lightning_light.example_input import ExampleInput
from lightning_light.helper_networks import first_call, frozen_parts, helper_networks
from lightning_light.lowrank import LowRankFactorization, factorize
from lightning_light.reparameterization import OREPA, Reparameterization
from lightning_light.schedules import OneShot
from lightning_light.sparsity import WeightPruning, prune_weights
from lightning_light.substitution import Substitution
from tests.contract.runs import checkpoints, differences, outcome, trainer
from tests.projects import BYOL, MeanTeacher
from tests.zoo import noise

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 16))


class Parts(L.LightningModule):
    """A student on a frozen backbone, beside the user's own teacher, a perceptual loss, and a momentum encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.student, self.teacher = network(32).requires_grad_(False), network(32), network(128)
        self.perceptual, self.momentum = network(64).requires_grad_(False), network(32).requires_grad_(False)
        self.teacher.requires_grad_(False)

    def losses(self, x: Tensor, out: Tensor) -> Tensor:
        with torch.no_grad():
            target, momentum = self.teacher(x), self.momentum(x)
        loss = F.mse_loss(out, target) + F.mse_loss(self.perceptual(out), self.perceptual(target))
        return loss + F.mse_loss(out, momentum)

    def train_dataloader(self) -> DataLoader:
        return DataLoader([noise(8, 16)] * 4, batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01)


class WithForward(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.student(self.backbone(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.losses(batch, self(batch))


class StepAlone(Parts):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.losses(batch, self.student(F.relu(self.backbone(batch))))


HELPERS = ["teacher", "perceptual", "momentum"]
KINDS = pytest.mark.parametrize("kind", [WithForward, StepAlone])


@KINDS
def test_helpers_are_told_from_a_frozen_backbone(kind) -> None:
    module = kind()
    assert frozen_parts(module) == ["backbone", *HELPERS]
    assert helper_networks(module, first_call(module, noise(8, 16))) == HELPERS
    assert first_call(module) is None
    if kind is WithForward:
        module.example_input_array = noise(2, 16)
        assert helper_networks(module, first_call(module)) == HELPERS


METHODS: dict[str, Any] = {
    "masks": lambda: WeightPruning(Sparsity(0.5), schedule=OneShot(at=0.3)),
    "masks_at_once": lambda: WeightPruning(Sparsity(0.5), schedule=OneShot(at=0.0)),
    "clusters": lambda: WeightClustering(4, start=0.3),
    "factors": lambda: LowRankFactorization(Params(0.85), schedule=OneShot(at=0.3)),
}


@pytest.mark.parametrize(
    ("kind", "method"), [*((StepAlone, name) for name in METHODS if name != "factors"), (WithForward, "factors")]
)
def test_a_run_leaves_them_alone_names_them_and_resumes(kind, method, tmp_path, caplog) -> None:
    ends = []
    for resume in (None, tmp_path / "epoch=1.ckpt"):
        module, before = kind(), kind().state_dict()
        run = trainer(METHODS[method](), *(checkpoints(tmp_path) if resume is None else ()))
        with caplog.at_level("INFO"):
            run.fit(module, ckpt_path=resume)
        ends.append(outcome(run, module))
    assert not differences(*ends)
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(tuple(HELPERS)))
    assert caplog.text.count("left alone, frozen and only used to train") == (2 if method.startswith("masks") else 1)
    if method.startswith("masks"):
        own = [value for name, value in after.items() if name.startswith(("student", "backbone")) and value.ndim == 2]
        share = sum(int((weight == 0).sum()) for weight in own) / sum(weight.numel() for weight in own)
        assert abs(share - 0.5) < 0.01
    elif method == "clusters":
        assert all(len(after[f"{name}.0.weight"].unique()) == 4 for name in ("student", "backbone"))
    else:
        count = sum(value.numel() for name, value in after.items() if name.startswith(("student", "backbone")))
        assert count <= 0.85 * 2144


def test_a_criterion_of_gradients_does_not_refuse_the_teacher() -> None:
    module = StepAlone()
    module.backbone.requires_grad_(True)
    trainer(WeightPruning(Sparsity(0.5), criterion=Taylor(), schedule=OneShot(at=0.5))).fit(module)
    assert (module.student[0].weight == 0).any()
    assert not (module.teacher[0].weight == 0).any()


def test_functions_and_budgets_leave_them_alone() -> None:
    module, x = WithForward(), noise(2, 16)
    parts = (module.backbone, module.student)
    own = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert Params(0.5).measure(module, ExampleInput.of(x)) == own
    assert Size("1 MB").measure(module, ExampleInput.of(x)) == 4 * own
    assert {name.partition(".")[0] for name in prune_weights(module, x, Sparsity(0.5))} == {"backbone", "student"}
    assert {row.name.partition(".")[0] for row in cluster(module, x, 4)} == {"backbone", "student"}
    plan = factorize(WithForward(), x, Params(0.85))
    assert plan.before == own
    assert plan.after <= 0.85 * own
    assert "only used to train" in plan.skipped["teacher.0"]


def test_an_average_is_left_alone_though_its_parameters_are_not_frozen() -> None:
    module = MeanTeacher()
    assert frozen_parts(module) == ["teacher", "perceptual"]
    trainer(WeightClustering(8, start=0.3), max_epochs=2).fit(module)
    assert [len(net[0][0].weight.unique()) for net in (module.student, module.teacher.module)] == [8, 216]


@pytest.mark.parametrize(
    "method", [LowRankFactorization(Params(0.9), schedule=OneShot(at=0.5)), Substitution(Params(0.9))], ids=repr
)
def test_layers_that_the_average_of_a_step_does_not_follow_are_refused_before_the_first_step(method, caplog) -> None:
    run = trainer(method)
    with pytest.raises(BudgetError) as caught, caplog.at_level("INFO"):
        run.fit(BYOL())
    assert run.global_step == 0
    reason = r"online\.0\.0.*: in the training step the model does not run with a replacement"
    assert re.search(reason, caplog.text + str(caught.value))


def test_branches_that_the_average_of_a_step_does_not_follow_are_left_out() -> None:
    run = trainer(Reparameterization(OREPA()))
    with pytest.warns(NoEffectWarning, match=r"online\.0\.0 \(the model does not run"):
        run.fit(module := BYOL())
    assert run.global_step > 0
    assert len(list(module.online.parameters())) == len(list(module.target.parameters()))
