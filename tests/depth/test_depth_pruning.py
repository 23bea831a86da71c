"""`DepthPruning` in a Trainer: on networks written in several ways, and what it refuses."""

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

import lightning_light as ll
from lightning_light.lowrank import RankAllocation, RankRatio
from lightning_light.schedules import Linear, OneShot, Window
from tests.contract.bodies import Tied
from tests.contract.cases.depth import Deep
from tests.contract.runs import module_class, trainer


class Frozen(Deep):
    def make(self) -> None:
        super().make()
        self.features[:3].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


class Manual(Deep):
    """Two optimizers, one of them for the blocks alone."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        blocks = list(self.features[1:4].parameters())
        others = [*self.features[0].parameters(), *self.head.parameters()]
        return [torch.optim.Adam(blocks, lr=0.01), torch.optim.SGD(others, lr=0.01)]


class Compiled(Deep):
    def make(self) -> None:
        super().make()
        self.features.compile(backend="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in compilation
@pytest.mark.parametrize("body", [Frozen, Manual, Compiled])
def test_blocks_leave_the_network_and_every_optimizer(body: type[Deep]) -> None:
    module = module_class(body, L)()
    pruning = ll.DepthPruning(ll.MACs(0.5), schedule=Window(Linear(), start=0.2, end=0.7), calibration_batches=2)
    run = trainer(pruning)
    run.fit(module)
    removed = pruning.state(module)["removed"]
    assert len(removed) == 2
    assert all(not list(module.get_submodule(name).parameters()) for name in removed)
    owned = {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in module.parameters() if p.requires_grad}


def test_the_last_blocks_go_at_the_end_of_the_window_and_training_goes_on_between() -> None:
    module = module_class(Deep, L)()
    events: list[tuple[int, int]] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            events.append((trainer.global_step, sum(p.numel() > 0 for p in pl_module.features.parameters())))

    pruning = ll.DepthPruning(ll.MACs(0.45), schedule=Window(Linear(), start=0.25, end=0.75), every_n_steps=3)
    trainer(pruning, Watch()).fit(module)
    counts = [count for _, count in events]
    assert counts[:3] == [counts[0]] * 3
    assert sorted(set(counts), reverse=True) == [counts[0], counts[0] - 6, counts[0] - 12]
    assert counts[9:] == [counts[0] - 12] * 3


def test_a_budget_out_of_reach_is_refused_before_the_first_optimizer_step() -> None:
    module = module_class(Deep, L)()
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    with pytest.raises(ll.BudgetError, match="without any of the 3 residual blocks"):
        trainer(ll.DepthPruning(ll.MACs(0.01))).fit(module)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.named_parameters())


def test_a_step_that_does_not_call_the_module_is_refused_after_its_first_batch() -> None:
    class Parts(Deep):
        example_input_array = torch.zeros(2, 3, 8, 8)

        def loss(self, batch: Any) -> Tensor:
            return torch.nn.functional.cross_entropy(self.head(self.features(batch[0])), batch[1])

    with pytest.raises(ll.errors.UnsupportedError, match=r"expected a LightningModule that calls `self\(...\)`"):
        trainer(ll.DepthPruning(ll.MACs(0.5), schedule=OneShot(at=0.5))).fit(module_class(Parts, L)())


def test_a_network_without_residual_modules_is_refused_with_the_reasons() -> None:
    with pytest.raises(ll.BudgetError, match=r"0 residual blocks.*Kept: features: changes the shape"):
        trainer(ll.DepthPruning(ll.MACs(0.5))).fit(module_class(Tied, L)())


def test_layers_of_removed_blocks_are_not_factorized() -> None:
    module = module_class(Deep, L)()
    pruning = ll.DepthPruning(ll.MACs(0.5), schedule=Window(Linear(), start=0.2, end=0.5), calibration_batches=2)
    factorization = ll.LowRankFactorization(RankRatio(0.2), allocation=RankAllocation(round_to=1))
    trainer(pruning, factorization).fit(module)
    removed = pruning.state(module)["removed"]
    factorized = factorization.state(module)["layers"]
    assert len(removed) == 2
    assert factorized
    assert not any(name.startswith(f"{block}.") for name in factorized for block in removed)
