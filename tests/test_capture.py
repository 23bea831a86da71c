"""Steps that call parts of the module: every method finds its example input in them, or refuses early."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_light.budgets import MACs
from lightning_light.capture import observe
from lightning_light.errors import LightningLightError, TraceError, UnsupportedError
from lightning_light.export import MobileExport, TorchScriptLite
from lightning_light.lowrank import LowRankFactorization
from lightning_light.measure.cost import count_cost
from lightning_light.monitors import CompressionMonitor
from lightning_light.quantization import QuantizationAwareTraining
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning
from lightning_light.surgery.attachment import state_of
from tests.contract.runs import shapes, trainer
from tests.projects import Autoencoder, Forecaster, Project, Segmentation
from tests.zoo import noise


class Inner(Forecaster):
    """``forward`` takes what the inner model gets."""

    def make(self) -> None:
        super().make()
        self.example_input_array = None


class Bare(Segmentation):
    """Without ``forward``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.outputs.append(batch[0])
        return self.loss(self.model(batch[0]), (batch[0].mean(1, keepdim=True) > 0).float())


class Stubborn(Project):
    """``forward`` takes nothing that the step has, and the step calls it by no name."""

    def make(self) -> None:
        self.net, self.embedding = torch.nn.Linear(192, 5), torch.nn.Linear(7, 192)

    def forward(self, code: Tensor) -> Tensor:
        return self.net(self.embedding(code))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0].flatten(1)), batch[1])


def test_what_forward_may_be_called_with() -> None:
    module = Inner()
    batch = module.train_dataloader().batches[0]
    found = observe(module, batch).example
    assert found is not None
    assert found.method == "forward"
    assert torch.equal(found.args[0], batch["past"][:2])
    assert torch.equal(found.kwargs["known"], batch["known"][:2])
    assert found.kwargs["static"] is None
    assert set(batch) == {"past", "known", "static", "future"}
    assert observe(Bare(), Bare().train_dataloader().batches[0]).example.method == "training_step"
    called = observe(Autoencoder(), Autoencoder().train_dataloader().batches[0])
    assert (called.example.method, called.only_forward) == ("forward", False)


@pytest.mark.parametrize("kind", [Inner, Bare])
def test_low_rank_reaches_its_budget(kind) -> None:
    module = kind()
    before = sum(p.numel() for p in module.parameters())
    trainer(LowRankFactorization(MACs(0.92), schedule=OneShot(at=0.5)), max_epochs=1).fit(module)
    assert sum(p.numel() for p in module.parameters()) < before


@pytest.mark.parametrize("kind", [Inner, Bare])
def test_quantization_finds_all_layers(kind) -> None:
    module = kind()
    quantization = QuantizationAwareTraining(start=0.0, calibration_batches=2)
    trainer(quantization, max_epochs=2).fit(module)
    state = state_of(module).state["quantization_aware_training"]
    layers = {"model.past", "model.known", "model.mean", "model.scale"}
    assert state["enabled"]
    assert set(state["layers"]) == (layers if kind is Inner else {"model.0.0", "model.0.3", "model.1"})
    assert torch.isfinite(state["ranges"]).all()


@pytest.mark.parametrize("kind", [Inner, Bare])
def test_the_monitor_counts_what_the_step_runs(kind) -> None:
    module = kind()
    monitor = CompressionMonitor(table=False)
    trainer(monitor, max_epochs=1).fit(module)
    given = noise(1, 3, 8, 8) if kind is Bare else noise(1, 12, 2)
    known = {} if kind is Bare else {"known": noise(1, 4, 3)}
    assert monitor.before.macs == count_cost(module.model, (given,), known).macs


def test_a_part_is_exported_where_forward_is_not_implemented(tmp_path) -> None:
    module = Bare()
    with pytest.raises(UnsupportedError, match=r"expected a `forward` to export.*`module=.*'model'"):
        trainer(MobileExport(tmp_path / "net.ptl")).fit(module)
    with pytest.raises(ValueError, match=r"name of a submodule of `Bare`.*nearest are \['model'"):
        trainer(MobileExport(tmp_path / "net.ptl", module="modle")).fit(module)
    quantized = [QuantizationAwareTraining(), MobileExport(tmp_path / "net.ptl", module="model")]
    with pytest.raises(UnsupportedError, match="Implement `forward` in `Bare`"):
        trainer(*quantized).fit(module)
    assert not module.outputs
    export = MobileExport(tmp_path / "net.ptl", module="model", latency_runs=2)
    trainer(export, max_epochs=1).fit(module)
    image = noise(3, 3, 8, 8)
    torch.testing.assert_close(TorchScriptLite().load(tmp_path / "net.ptl")(image), module.eval().model(image))


def test_an_unknown_input_is_refused_after_the_first_batch(tmp_path) -> None:
    module = Stubborn()
    run = trainer(MobileExport(tmp_path / "net.ptl"))
    with pytest.raises(LightningLightError, match=r"inputs of `Stubborn.forward`.*example_input_array.*module='net'"):
        run.fit(module)
    assert run.global_step == 1


def test_a_step_that_does_not_run_in_isolation_is_refused_unless_forward_shows_everything() -> None:
    class Gradients(Project):
        def make(self) -> None:
            self.example_input_array = noise(2, 3, 8, 8)
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16), torch.nn.Linear(16, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            assert loss.requires_grad
            return loss

    class Beside(Gradients):
        def forward(self, x: Tensor) -> Tensor:
            return self.net[:2](x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self.net[2](self(batch[0])), batch[1])
            assert loss.requires_grad
            return loss

    module = Gradients()
    trainer(StructuredPruning(MACs(0.5), schedule=OneShot(at=0.5)), max_epochs=1).fit(module)
    assert shapes(module) != shapes(Gradients())
    with pytest.raises(TraceError, match=r"`Beside.training_step` does not run in a trace.*AssertionError"):
        trainer(StructuredPruning(MACs(0.5))).fit(Beside())
