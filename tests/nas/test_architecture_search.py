"""`ArchitectureSearch` in a Trainer: what it reaches, and what it refuses."""

import io
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

import lightning_light as ll
from lightning_light.measure import count_cost
from lightning_light.nas import BlockChoices, ChannelChoices, OperatorChoices, RankChoices
from lightning_light.schedules import Linear, OneShot, Window
from lightning_light.substitution import DepthwiseSeparable
from tests.contract.bodies import TwoOptimizers
from tests.contract.cases.depth import Deep
from tests.contract.runs import module_class, trainer

SMALL: dict[str, Any] = {
    "schedule": OneShot(at=0.3),
    "space": [BlockChoices(), ChannelChoices((0.5,), targets="features.1"), RankChoices((0.5,), targets="features.2")],
    "calibration_batches": 1,
    "evaluation_batches": 1,
    "evaluations": 1,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_budgets_are_met_the_optimizer_follows_and_the_table_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    module = module_class(Deep, L)()
    dense = count_cost(module, (torch.zeros(1, 3, 8, 8),))
    method = ll.ArchitectureSearch([ll.MACs(0.5), ll.Params(0.6)], table=tmp_path / "table.json", **SMALL)
    run = trainer(method, enable_progress_bar=True)
    run.fit(module)
    assert all(f"{part}: " in terminal.getvalue() for part in ("outputs and counts", "whole networks"))
    small = count_cost(module, (torch.zeros(1, 3, 8, 8),))
    assert small.macs <= 0.5 * dense.macs
    assert small.params <= 0.6 * dense.params
    assert method.result is not None
    assert method.state(module)["items"] == [item.name for item in method.result.items]
    assert (tmp_path / "table.json").exists()
    owned = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert owned == {id(p) for p in module.parameters()}


def test_a_budget_out_of_reach_is_refused_before_the_first_optimizer_step() -> None:
    module = module_class(Deep, L)()
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    with pytest.raises(ll.BudgetError, match=r"`ArchitectureSearch\(...\)` cannot reach the budget: .*found \d"):
        trainer(ll.ArchitectureSearch(ll.MACs(0.01), **SMALL)).fit(module)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.named_parameters())


def test_a_table_of_another_space_is_refused_before_the_first_optimizer_step(tmp_path: Path) -> None:
    path, module = tmp_path / "table.json", module_class(Deep, L)()
    path.write_text('{"items": ["features.9: blocks removed"], "digest": ""}')
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    with pytest.raises(ValueError, match=r"expected a table of this space \(.*found one of another \(1 items"):
        trainer(ll.ArchitectureSearch(ll.MACs(0.5), table=path, **SMALL)).fit(module)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.named_parameters())
    assert "features.9" in path.read_text()


@pytest.mark.parametrize(
    ("budget", "options", "sentence"),
    [
        (ll.MACs(0.5), {"space": []}, r"`space=\[\]`: expected at least one of `BlockChoices`.*found no choices"),
        (ll.MACs(0.5), {"space": [ll.Int8()]}, r"found no choices and 1 recipes.*use `quantize`"),
        ([ll.MACs(0.5), ll.MACs(0.4)], {}, r"`ArchitectureSearch\(.*different quantities, found \['macs', 'macs'\]"),
        ([], {}, r"expected one budget or several"),
        (ll.Size("9 kB"), {"space": [BlockChoices(), ll.Int8()]}, r"expected the runtime of the int8 file, found none"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(budget: Any, options: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ll.ArchitectureSearch(budget, **options)


def test_a_step_that_calls_parts_beside_forward_is_refused() -> None:
    class Parts(Deep):
        example_input_array = torch.zeros(2, 3, 8, 8)

        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) + self.head(self.features(batch[0])).square().mean()

    with pytest.raises(ll.errors.UnsupportedError, match=r"calls `self\(...\)` and no part of the module beside it"):
        trainer(ll.ArchitectureSearch(ll.MACs(0.5), **SMALL)).fit(module_class(Parts, L)())


def test_int8_costs_need_a_method_that_quantizes() -> None:
    options = {**SMALL, "space": [BlockChoices(), ll.Int8()], "runtime": ll.ONNX()}
    with pytest.raises(ll.errors.UnsupportedError, match="Add `QuantizationAwareTraining"):
        trainer(ll.ArchitectureSearch(ll.Size("10 kB"), **options)).fit(module_class(Deep, L)())


def test_a_gradual_schedule_makes_the_same_changes_in_the_order_of_the_methods() -> None:
    found: list[list[str]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            found.append(gradual.state(pl_module).get("items", []))

    operators = OperatorChoices([DepthwiseSeparable(3)], "features.3.*")
    space = [BlockChoices("features.1"), operators, RankChoices((0.5,), targets="features.2")]
    budget, at_once, module = ll.MACs(0.52), module_class(Deep, L)(), module_class(Deep, L)()
    options = {**SMALL, "space": space}
    trainer(ll.ArchitectureSearch(budget, **options)).fit(at_once)
    window = Window(Linear(), start=0.3, end=0.8)
    gradual = ll.ArchitectureSearch(budget, **{**options, "schedule": window})
    trainer(gradual, Watch()).fit(module)
    assert [p.shape for p in module.parameters()] == [p.shape for p in at_once.parameters()]
    kinds = [name.split()[1] for name in found[-1]]
    assert kinds == sorted(kinds, key=["blocks", "operators", "ranks"].index)
    assert {*kinds} == {"blocks", "operators", "ranks"}  # nothing less meets the budget
    assert len({len(names) for names in found}) == len(found[-1]) + 1 >= 3  # one change at a time
    assert "inputs" not in gradual.state(module)


@pytest.mark.slow
def test_two_optimizers_and_manual_optimization() -> None:
    module = module_class(TwoOptimizers, L)()
    options = {**SMALL, "space": [ChannelChoices((0.5,)), RankChoices((0.5,))]}
    trainer(ll.ArchitectureSearch(ll.Params(0.7), **options)).fit(module)
    owned = sum(p.numel() for o in module.trainer.optimizers for g in o.param_groups for p in g["params"])
    assert owned == sum(p.numel() for p in module.parameters())
