"""`plan` and `fast_dev_run`: a run is rehearsed on a copy, and nothing of the user's changes."""

import logging
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_light as ll
from lightning_light.criteria import Taylor
from lightning_light.errors import BudgetError, OrderError
from lightning_light.measure import count_cost
from lightning_light.nas import ChannelChoices
from lightning_light.reparameterization import ACB
from lightning_light.substitution import DepthwiseSeparable
from tests.zoo import Boring, noise


def chain(path: Path) -> list[Any]:
    return [
        ll.KnowledgeDistillation("self"),
        ll.Reparameterization(ACB(), merge=0.05),
        ll.StructuredPruning(ll.MACs(0.5), criterion=Taylor()),
        ll.WeightPruning(ll.Sparsity(0.5), targets="net.conv*"),
        ll.WeightClustering(8),
        ll.QuantizationAwareTraining(),
        ll.CompressionMonitor(),
        ll.MobileExport(path / "model.ptl"),
    ]


def test_a_chain_is_planned_on_a_copy_in_the_order_of_its_stages(tmp_path: Path) -> None:
    module = Boring()
    optimizer = module.configure_optimizers()
    callbacks = chain(tmp_path)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state, attributes, random_state = optimizer.state_dict(), sorted(vars(module)), torch.get_rng_state()
    written = repr(callbacks)
    plan = ll.plan(module, Boring.data(), callbacks, max_epochs=10)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert (optimizer.state_dict(), sorted(vars(module))) == (state, attributes)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert repr(callbacks) == written
    assert list(tmp_path.iterdir()) == []
    kinds = [each.method.partition("(")[0] for each in plan.methods]
    assert kinds == [type(each).__name__ for each in callbacks if not isinstance(each, ll.CompressionMonitor)]
    _, expanded, pruned, masked, clustered, quantized, exported = plan.methods
    assert plan.before.macs == count_cost(module, (noise(1, 3, 8, 8),)).macs
    assert expanded.lines[-1] == "net.shortcut: left alone (ACB has no branches for a 1x1 kernel)"
    assert pruned.after.macs <= 0.5 * plan.before.macs
    assert (pruned.when, pruned.position) == ("10% to 40%", ", epochs 1 to 4, steps 4 to 16")
    assert "net.fc: kept (produces the model output)" in pruned.lines
    assert "net.stem: left alone (not among the targets)" in masked.lines
    assert masked.after.params == pruned.after.params
    assert masked.after.sparsity > 0.3
    assert clustered.lines[0].startswith("net.stem.weight: 8 values")
    assert quantized.lines[0] == "net.stem: weights of 8 bits, inputs of 8 bits"
    assert quantized.after.bytes < 0.5 * clustered.after.bytes
    assert exported.lines[0].startswith("model.ptl: ")
    assert "the end" in str(plan.overview())
    assert plan._repr_html_().count("<table>") == 8


def test_a_plan_has_the_structure_that_the_function_makes() -> None:
    module, example = Boring(), noise(2, 3, 8, 8)
    plan = ll.plan(module, example, [ll.StructuredPruning(ll.Params(0.6))])
    ll.prune_channels(module, example, ll.Params(0.6))
    assert plan.methods[0].after.params == sum(parameter.numel() for parameter in module.parameters())


def test_methods_that_choose_by_outputs_are_planned_with_the_batches() -> None:
    search = ll.ArchitectureSearch(ll.MACs(0.8), space=[ChannelChoices((0.5,))])
    substitution = ll.Substitution(ll.MACs(0.6), operators=[DepthwiseSeparable()])
    for callback, fraction, line in (
        (search, 0.8, ": channels 0.5"),
        (substitution, 0.6, ": DepthwiseSeparable(multiplier=1)"),
    ):
        plan = ll.plan(Boring(), Boring.data(), [callback])
        assert plan.methods[0].after.macs <= fraction * plan.before.macs
        assert any(each.endswith(line) for each in plan.methods[0].lines)
    (alone,) = ll.plan(Boring(), noise(2, 3, 8, 8), [search]).methods
    assert alone.lines == ["(network): chosen in the run, which needs two training batches"]


def test_what_the_run_would_refuse_is_refused() -> None:
    example = noise(2, 3, 8, 8)
    with pytest.raises(BudgetError, match="cannot be reached"):
        ll.plan(Boring(), example, [ll.StructuredPruning(ll.MACs(0.001))])
    with pytest.raises(OrderError, match="expected StructuredPruning, QuantizationAwareTraining"):
        ll.plan(Boring(), example, [ll.QuantizationAwareTraining(start=0.2), ll.StructuredPruning(ll.MACs(0.5))])
    with pytest.raises(ValueError, match="expected a method among the callbacks, found none"):
        ll.plan(Boring(), example, [])


def test_a_criterion_that_needs_training_is_replaced_in_writing() -> None:
    plan = ll.plan(Boring(), noise(2, 3, 8, 8), [ll.StructuredPruning(ll.MACs(0.5), criterion=Taylor())])
    assert plan.methods[0].lines[0].startswith("(network): chosen here by Magnitude(p=2.0); Taylor(")


def trainer(*callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(callbacks=list(callbacks), enable_model_summary=False, **{**quiet, **options})


def test_fast_dev_run_logs_the_plan_of_the_whole_run(caplog: pytest.LogCaptureFixture) -> None:
    pruning = ll.StructuredPruning(ll.MACs(0.5), schedule=ll.Window(ll.Cubic(), start=3, end=5))
    with caplog.at_level(logging.INFO):
        trainer(pruning, ll.QuantizationAwareTraining(), fast_dev_run=True).fit(Boring(), Boring.data(), Boring.data())
    (logged,) = [record.message for record in caplog.records if record.message.startswith("fast_dev_run")]
    assert logged.startswith("fast_dev_run: the whole run of 8 epochs would do this\n")  # the fewest before 70 %
    assert "epochs 3 to 5" in logged
    assert "(produces the model output)" in logged


@pytest.mark.parametrize(
    "callback",
    [
        ll.Substitution(ll.MACs(0.6), operators=[DepthwiseSeparable()], start=3),
        ll.ArchitectureSearch(ll.MACs(0.8), space=[ChannelChoices((0.5,))], schedule=ll.Window(ll.OneShot(), 3, 4)),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_fast_dev_run_with_a_moment_in_epochs(callback: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(callback, fast_dev_run=True).fit(Boring(), Boring.data(), Boring.data())
    (logged,) = [record.message for record in caplog.records if record.message.startswith("fast_dev_run")]
    assert re.match(r"fast_dev_run: the whole run of [34] epochs would do this\n", logged)


def test_a_run_that_max_steps_or_max_time_cuts_short_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(ll.StructuredPruning(ll.MACs(0.5)), max_epochs=30, max_steps=6).fit(
            Boring(), Boring.data(), Boring.data()
        )
    assert any("the run ends after 6 of 120 steps" in record.message for record in caplog.records)
    with pytest.warns(UserWarning, match=r"max_time=...\)`: expected time for 400000 steps"):
        trainer(ll.CompressionMonitor(table=False), max_epochs=100_000, max_time=timedelta(seconds=0.7)).fit(
            Boring(), Boring.data(), Boring.data()
        )
