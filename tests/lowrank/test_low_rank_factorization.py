"""The callback, the checkpoint converter, attention, chains; with real Trainers."""

import copy
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_light.budgets import Channels, Latency, MACs, Params, Size, Sparsity
from lightning_light.cli.command import main
from lightning_light.clustering import WeightClustering
from lightning_light.errors import BudgetError, LightningLightError
from lightning_light.example_input import ExampleInput
from lightning_light.export import MobileExport
from lightning_light.lowrank import (
    FisherSVD,
    LowRankFactorization,
    NuclearNorm,
    Orthogonality,
    OutputChange,
    RankAllocation,
    RankRatio,
    RetainedEnergy,
    WhitenedSVD,
    factorize,
    factorize_checkpoint,
)
from lightning_light.lowrank.build import dense_weight
from lightning_light.lowrank.factors import Factors, factor_form
from lightning_light.lowrank.regularize import add_regularizer_gradients
from lightning_light.lowrank.splitting import split_module, split_weights
from lightning_light.measure import count_cost
from lightning_light.schedules import Cubic, Linear, OneShot, Schedule, Staircase, Window
from lightning_light.structured import StructuredPruning
from lightning_light.surgery.attachment import attach, state_of
from lightning_light.surgery.checkpoint import load_from_checkpoint
from lightning_light.surgery.manifest import KEY
from tests.contract.bodies import Body, Features, module_class
from tests.contract.runs import differences, trainer
from tests.zoo import ZOO

LIT = module_class(Body, lightning.pytorch)
EXAMPLE = (torch.zeros(1, 3, 8, 8),)
Body_lightning = LIT


def test_optimizer_owns_the_factors_at_the_same_place_of_the_same_group() -> None:
    class Groups(LIT):
        def configure_optimizers(self) -> Any:
            first, second = list(self.features.parameters()), list(self.head.parameters())
            return torch.optim.AdamW([{"params": first, "lr": 0.01}, {"params": second, "lr": 0.02}])

    module = Groups()
    run = trainer(
        LowRankFactorization(
            RankRatio(0.25), schedule=OneShot(at=0.5), form="tucker2", allocation=RankAllocation(round_to=1)
        )
    )
    run.fit(module)
    groups = run.optimizers[0].param_groups
    owned = [[id(parameter) for parameter in group["params"]] for group in groups]
    in_order = [[id(p) for p in part.parameters()] for part in (module.features, module.head)]
    assert [set(group) for group in owned] == [set(group) for group in in_order]
    assert owned[0][:3] == [id(layer.weight) for layer in module.features.stem]  # where the stem's weight was
    assert factor_form(module.head) == "linear"
    for group in groups:
        for parameter in group["params"]:
            assert run.optimizers[0].state[parameter]["exp_avg"].shape == parameter.shape


def test_biases_keep_their_object_and_their_momentum() -> None:
    seen = []

    class Recorder(lightning.pytorch.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            last = pl_module.features.last
            bias = (last[-1] if isinstance(last, nn.Sequential) else last).bias
            seen.append((id(bias), float(trainer.optimizers[0].state.get(bias, {}).get("step", 0))))

    trainer(
        LowRankFactorization(RankRatio(0.25), schedule=OneShot(at=0.5), allocation=RankAllocation(round_to=1)),
        Recorder(),
    ).fit(LIT())
    assert len({identity for identity, _ in seen}) == 1
    assert [step for _, step in seen] == list(range(12))


def test_gradual_schedule_ends_at_the_budget_and_only_decreases() -> None:
    costs = []

    class Recorder(lightning.pytorch.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            costs.append(count_cost(pl_module, EXAMPLE).macs)

    module = LIT()
    dense = count_cost(module, EXAMPLE).macs
    trainer(
        LowRankFactorization(
            MACs(0.35),
            schedule=Window(Linear(), start=0.1, end=0.8),
            every_n_steps=2,
            allocation=RankAllocation(round_to=1),
        ),
        Recorder(),
    ).fit(module)
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) >= 4
    assert costs[-1] <= 0.35 * dense
    kinds = {
        type(part)
        for name, part in module.named_modules()
        if factor_form(module.get_submodule(name.rpartition(".")[0]))
    }
    assert kinds <= {nn.Conv2d, nn.Linear}  # factors, never factors of factors


def test_rank_energy_and_error_are_logged_and_stored(tmp_path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    module, logger = LIT(), CSVLogger(tmp_path)
    trainer(
        LowRankFactorization(MACs(0.5), schedule=OneShot(at=0.5), allocation=RankAllocation(round_to=1)), logger=logger
    ).fit(module)
    (layer, fact), *_ = state_of(module).state["low_rank"]["layers"].items()
    header = Path(logger.log_dir, "metrics.csv").read_text().partition("\n")[0]
    for quantity in ("rank", "energy_kept", "reconstruction_error"):
        assert f"low_rank/{quantity}/{layer}" in header
    assert 0.0 < fact["energy_kept"] < 1.0
    assert fact["reconstruction_error"] == pytest.approx((1.0 - fact["energy_kept"]) ** 0.5)


def test_chain_of_pruning_factors_fake_quantization_clusters_and_export(tmp_path) -> None:
    class FakeInt8(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            scale = weight.detach().abs().max() / 127
            return weight + ((weight / scale).round() * scale - weight).detach()

    module = LIT()
    trainer(
        StructuredPruning(MACs(0.7), schedule=OneShot(at=0.2)),
        LowRankFactorization(MACs(0.6), schedule=OneShot(at=0.5), allocation=RankAllocation(round_to=1)),
    ).fit(module)
    assert module.features.conv1 is not None
    factored = [name for name in dict(module.named_modules()) if factor_form(module.get_submodule(name))]
    assert factored
    assert count_cost(module, EXAMPLE).macs <= 0.6 * count_cost(LIT(), EXAMPLE).macs
    for name in factored:
        parametrize.register_parametrization(module.get_submodule(name)[0], "weight", FakeInt8())
    export = MobileExport(tmp_path / "net.ptl", latency_runs=2)
    trainer(WeightClustering(16, start=0.2), export).fit(module)
    assert export.report is not None


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # no need to save again
def test_prune_then_factor_in_one_run_resumes_bit_for_bit(tmp_path) -> None:
    from tests.contract.runs import checkpoints

    def callbacks() -> list[Any]:
        return [
            StructuredPruning(MACs(0.7), schedule=OneShot(at=0.2)),
            LowRankFactorization(MACs(0.6), schedule=OneShot(at=0.5), allocation=RankAllocation(round_to=1)),
            WeightClustering(8, start=0.7),
        ]

    whole = LIT()
    trainer(*callbacks(), *checkpoints(tmp_path)).fit(whole)
    for step in (2, 5, 8):
        again = LIT()
        trainer(*callbacks()).fit(again, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert not differences(whole.state_dict(), again.state_dict()), step


def test_finished_checkpoint_is_converted_and_loads(tmp_path, capsys) -> None:
    module = LIT()
    run = trainer()
    run.fit(module)
    run.save_checkpoint(tmp_path / "dense.ckpt")
    allocation = RankAllocation(round_to=1)
    plan = factorize_checkpoint(
        LIT, tmp_path / "dense.ckpt", tmp_path / "small.ckpt", MACs(0.5), example_inputs=EXAMPLE, allocation=allocation
    )
    loaded = load_from_checkpoint(LIT, tmp_path / "small.ckpt")
    assert count_cost(loaded, EXAMPLE).macs == plan.after <= 0.5 * plan.before
    by_hand = load_from_checkpoint(LIT, tmp_path / "dense.ckpt")
    factorize(by_hand, EXAMPLE, MACs(0.5), allocation=allocation)
    assert not differences(dict(by_hand.state_dict()), dict(loaded.state_dict()))
    trainer(max_epochs=1).fit(loaded)  # and goes on training
    assert "weights_only" not in torch.load(tmp_path / "small.ckpt", weights_only=True)
    name = "tests.lowrank.test_low_rank_factorization:Body_lightning"
    sys.modules["tests.lowrank.test_low_rank_factorization"] = sys.modules[__name__]
    paths = [str(tmp_path / "dense.ckpt"), f"--to={tmp_path}/cli.ckpt"]
    assert main(["convert", *paths, f"--module={name}", "--macs=0.5", "--round_to=1", "--example=1,3,8,8"]) == 0
    assert "energy kept" in capsys.readouterr().out
    again = load_from_checkpoint(LIT, tmp_path / "cli.ckpt")
    assert not differences(
        dict(again.state_dict()), dict(load_from_checkpoint(LIT, tmp_path / "small.ckpt").state_dict())
    )


def test_checkpoint_without_factorizable_layer_is_not_written(tmp_path) -> None:
    run = trainer()
    run.fit(LIT())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(LightningLightError, match="found none, and wrote nothing"):
        factorize_checkpoint(LIT, tmp_path / "dense.ckpt", tmp_path / "x.ckpt", MACs(1.0), example_inputs=EXAMPLE)
    assert not (tmp_path / "x.ckpt").exists()


def test_checkpoint_of_a_factorized_module_loads(tmp_path) -> None:
    module = LIT()
    factorize(module, EXAMPLE, MACs(0.5), allocation=RankAllocation(round_to=1))
    run = trainer(max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "small.ckpt")
    loaded = load_from_checkpoint(LIT, tmp_path / "small.ckpt")
    assert not differences(dict(module.state_dict()), dict(loaded.state_dict()))


def test_factorized_modules_consist_of_torch_layers(tmp_path) -> None:
    model = ZOO["plain"]().eval()
    args, _ = model.example
    factorize(model, args, RankRatio(0.3), allocation=RankAllocation(round_to=1))
    expected = {name: type(part) for name, part in model.named_modules()}
    assert all(kind.__module__.startswith(("torch.", "tests.")) or kind is Factors for kind in expected.values())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(*args), model(*args))
    assert factor_form(copy.deepcopy(model).conv2) is not None


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_split_attention_computes_the_same(batch_first, need_weights) -> None:
    for options in ({}, {"bias": False}, {"kdim": 10, "vdim": 6}):
        attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options).double().eval()
        split = split_module(attention).eval()
        query = torch.randn(2, 5, 16, dtype=torch.float64)
        key = torch.randn(2, 7, options.get("kdim", 16), dtype=torch.float64)
        value = torch.randn(2, 7, options.get("vdim", 16), dtype=torch.float64)
        padding, mask = torch.zeros(2, 7, dtype=torch.bool), torch.zeros(5, 7, dtype=torch.bool)
        padding[0, -2:] = mask[:, 0] = True
        if not batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        for masks in (
            {},
            {"key_padding_mask": padding},
            {"attn_mask": mask},
            {"key_padding_mask": padding, "attn_mask": mask},
        ):
            for average in (True, False):
                call = {**masks, "need_weights": need_weights, "average_attn_weights": average}
                expected, found = attention(query, key, value, **call), split(query, key, value, **call)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["attention", "encoder"])
def test_attention_is_factorized_per_projection_and_trains(name) -> None:
    model = ZOO[name]().eval()
    args, _ = model.example
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    allocation = RankAllocation(round_to=1)
    plan = factorize(model, args, RankRatio(0.25), allocation=allocation, optimizers=[optimizer])
    assert any(layer.endswith("q_proj") for layer in plan.layers)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    with torch.no_grad():
        model(*args)  # the encoder's fast path would ask for weights that are not there any more
    model.train()
    model(*args).sum().backward()
    optimizer.step()


def test_every_part_of_a_fused_layer_has_its_own_ranks() -> None:
    model = ZOO["fused_qkv"]().eval()
    args, _ = model.example
    with torch.no_grad():
        model.qkv.weight[:16] = model.qkv.weight[:16, :1] * torch.ones(16)  # the queries have rank one
    expected = model(*args)
    plan = factorize(
        model, args, RetainedEnergy(0.999999), split={"qkv": 3}, targets="qkv", allocation=RankAllocation(round_to=1)
    )
    assert list(plan.layers) == ["qkv.parts.0"]
    assert plan.layers["qkv.parts.0"].ranks == (1,)
    torch.testing.assert_close(model(*args), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10, "vdim": 6}], ids=str)
def test_every_head_of_an_attention_has_its_own_ranks(options) -> None:
    class Net(LIT):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attention(value=value, key=key, query=query)[0]

    module = Net()
    attention = module.attention
    x = torch.randn(2, 5, 16), torch.randn(2, 7, attention.kdim), torch.randn(2, 7, attention.vdim)
    query = attention.in_proj_weight if attention.in_proj_weight is not None else attention.q_proj_weight
    with torch.no_grad():
        query[8:16] = query[8:9]  # the second head's queries have rank one
    expected = module(*x)
    optimizer = torch.optim.AdamW(module.attention.parameters())
    plan = factorize(
        module,
        x,
        RetainedEnergy(0.999999),
        split={"attention": 2},
        targets="attention",
        allocation=RankAllocation(round_to=1),
        optimizers=[optimizer],
    )
    assert {name: found.ranks for name, found in plan.layers.items()} == {"attention.q_proj.parts.1": (1,)}
    torch.testing.assert_close(module(*x), expected, rtol=1e-4, atol=1e-5)
    owned = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(owned) == sorted(id(parameter) for parameter in module.attention.parameters())
    twin = Net()
    attach(twin).load(twin, {"state_dict": module.state_dict(), KEY: state_of(module).manifest(module)})
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(*x), module(*x))


def test_regularizers_match_their_formulas() -> None:
    layer = nn.Linear(6, 4).double()
    weight = layer.weight.detach().clone().requires_grad_()
    for regularizer, term in (
        (NuclearNorm(0.1), lambda w: 0.1 * torch.linalg.svdvals(w).sum()),
        (Orthogonality(0.2), lambda w: 0.1 * (w @ w.T - torch.eye(4)).square().sum()),
    ):
        (expected,) = torch.autograd.grad(term(weight), weight)
        layer.weight.grad = torch.zeros_like(layer.weight)
        add_regularizer_gradients(regularizer, [layer], layer.parameters())
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_nuclear_norm_makes_the_singular_values_decay_faster() -> None:
    energies = {}
    for regularizer in (None, NuclearNorm(0.05)):
        module = LIT()
        trainer(
            LowRankFactorization(
                RankRatio(0.25),
                schedule=OneShot(at=1.0),
                regularizer=regularizer,
                allocation=RankAllocation(round_to=1),
            )
        ).fit(module)
        facts = state_of(module).state["low_rank"]["layers"].values()
        energies[regularizer] = sum(fact["energy_kept"] for fact in facts) / len(facts)
    assert energies[NuclearNorm(0.05)] > energies[None]


def test_dry_run_changes_nothing() -> None:
    module = LIT()
    trainer(LowRankFactorization(MACs(0.5), dry_run=True, allocation=RankAllocation(round_to=2))).fit(module)
    assert {name: p.shape for name, p in module.named_parameters()} == {
        name: p.shape for name, p in LIT().named_parameters()
    }


@dataclass(frozen=True)
class Reversed(Schedule):
    """A schedule that a user may write: it starts at the budget and returns to the dense network."""

    def __call__(self, progress: float) -> float:
        return 1.0 - progress


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((), {}, TypeError, "budget"),
        ((), {"ranks": 8}, TypeError, r"`LowRankFactorization\(.*Its arguments: budget, schedule"),
        ((8,), {}, TypeError, r"`LowRankFactorization\(budget=8\)`: expected .* found int 8"),
        ((RankRatio,), {}, TypeError, "RankRatio"),
        ((Channels(0.5),), {}, ValueError, "channels"),
        ((Sparsity(0.5),), {}, ValueError, "sparsity"),
        ((MACs(0.5),), {"form": "cp"}, ValueError, "'tucker2'"),
        ((MACs(0.5),), {"fit": "whitened"}, TypeError, "expected a Fit"),
        ((MACs(0.5),), {"fit": WhitenedSVD}, TypeError, r"WhitenedSVD\(\)"),
        ((MACs(0.5),), {"schedule": "cubic"}, TypeError, "expected a Schedule"),
        ((MACs(0.5),), {"every_n_steps": 0}, ValueError, "an integer >= 1"),
        ((MACs(0.5),), {"schedule": Reversed()}, ValueError, "expected a schedule that rises"),
        ((MACs(0.5),), {"allocation": RankAllocation(importance="output")}, ValueError, "expected `data`"),
        ((OutputChange(),), {}, ValueError, "expected `data`"),
        ((RankRatio(),), {"schedule": Linear()}, ValueError, "a schedule of one step for a rule"),
        ((RankRatio(),), {"schedule": Staircase(Linear(), steps=3)}, ValueError, "a schedule of one step for a rule"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, options, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        LowRankFactorization(*arguments, **options)


def test_bad_constraints_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="an integer >= 1"):
        RankAllocation(round_to=0)
    with pytest.raises(ValueError, match="'output'"):
        RankAllocation(importance="loss")


def test_factorize_without_the_data_that_a_fit_needs_is_refused() -> None:
    model = ZOO["plain"]()
    example = model.example[0]
    for fit in (FisherSVD(), WhitenedSVD()):
        with pytest.raises(ValueError, match="expected `data`"):
            factorize(model, example, Params(0.5), fit=fit)
    with pytest.raises(ValueError, match="expected `loss`"):
        factorize(model, example, Params(0.5), fit=FisherSVD(), data=[example])


def test_epoch_after_the_end_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"Window\(start=7, end=8\)"):
        trainer(LowRankFactorization(MACs(0.5), schedule=Window(OneShot(), start=7, end=8))).fit(LIT())


class Snapshots(lightning.pytorch.Callback):
    """Copy module and optimizers in every hook in which the methods behind it in the list may act."""

    def __init__(self) -> None:
        self.last: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.last = copy.deepcopy(contents(trainer, pl_module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.last = copy.deepcopy(contents(trainer, pl_module))


def contents(run: Any, module: Any) -> dict[str, Any]:
    return {
        "modules": {name: type(part).__name__ for name, part in module.named_modules()},
        "weights": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
    }


SCHEDULES = {
    "default": LowRankFactorization(MACs(0.5)).schedule,
    "at_once": OneShot(),
    "late": OneShot(at=0.9),
    "gradual": Window(Linear(), start=0.0, end=0.8),
    "epochs": Window(Cubic(), start=0, end=2),
    "jumps": Window(Staircase(Linear(), steps=3), start=0.1, end=0.9),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("budget", [MACs(0.001), Params(0.001), Size("100 B"), Latency("1 ns")], ids=repr)
def test_unreachable_budget_changes_nothing_under_any_schedule(schedule, budget) -> None:
    module = LIT()
    if isinstance(budget, MACs | Latency):  # else the input is known after the first batch
        module.example_input_array = EXAMPLE[0]
    snapshots = Snapshots()
    run = trainer(snapshots, LowRankFactorization(budget, schedule=schedule, allocation=RankAllocation(round_to=1)))
    with pytest.raises(BudgetError, match=re.escape(repr(budget))):
        run.fit(module)
    before = snapshots.last or contents(run, LIT())  # refused before the first batch, or later
    assert not differences(before, contents(run, module))
    assert run.global_step == 0 or isinstance(budget, Latency)  # without having trained, unless layers must be timed


def test_unreachable_budget_after_pruning_is_refused_at_the_first_event() -> None:
    module, snapshots = LIT(), Snapshots()
    run = trainer(
        StructuredPruning(MACs(0.7), schedule=OneShot(at=0.2)),
        snapshots,
        LowRankFactorization(MACs(0.001), schedule=Window(Linear(), start=0.4, end=0.9)),
    )
    with pytest.raises(BudgetError, match=r"MACs\(remaining=0.001\)"):
        run.fit(module)
    assert not differences(snapshots.last, contents(run, module))


@pytest.mark.parametrize("budget", [MACs, Params])
def test_gradual_schedule_reaches_a_budget_just_above_the_lowest_ranks(budget) -> None:
    """The first event takes only forms from which the end can be reached."""
    allocation = RankAllocation(round_to=1)
    with pytest.raises(BudgetError) as refused:
        factorize(LIT(), EXAMPLE, budget(0.001), allocation=allocation)
    lowest = float(re.search(r"found ([\d.e+]+) when", str(refused.value))[1])
    dense = budget(1.0).measure(LIT(), ExampleInput(EXAMPLE))
    module, remaining = LIT(), 1.001 * lowest / dense
    schedule = Window(Linear(), start=0.0, end=0.9)
    method = LowRankFactorization(budget(remaining), schedule=schedule, every_n_steps=2, allocation=allocation)
    trainer(method).fit(module)
    assert budget(1.0).measure(module, ExampleInput(EXAMPLE)) <= remaining * dense


def test_two_factorizations_share_the_dense_reference() -> None:
    module = LIT()
    dense = count_cost(module, EXAMPLE).macs
    allocation = RankAllocation(round_to=1)
    trainer(
        LowRankFactorization(MACs(0.8), schedule=OneShot(at=0.2), targets="features.conv1", allocation=allocation),
        LowRankFactorization(MACs(0.6), schedule=OneShot(at=0.5), targets="features.conv2", allocation=allocation),
    ).fit(module)
    assert 0.55 * dense < count_cost(module, EXAMPLE).macs <= 0.6 * dense


@pytest.mark.parametrize("correct", [True, False])
def test_batch_norm_statistics_follow_the_factorization(correct) -> None:
    """On the inputs of the correction, the running statistics of a factorized network are those of its batches."""
    torch.manual_seed(0)
    model, x = Features(), torch.randn(64, 3, 8, 8)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the average of one batch is that batch
    model.train()(x)
    model.eval()
    dense = model(x)
    allocation = RankAllocation(round_to=1)
    factorize(model, x, RankRatio(0.2), data=[x], correct_batch_norm=correct, form="channel", allocation=allocation)
    corrected = copy.deepcopy(dict(model.named_buffers()))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    model.train()(x)
    exact = dict(model.named_buffers())
    names = [name for name in exact if name.endswith("running_mean")]
    assert all(torch.allclose(corrected[name], exact[name], rtol=1e-3, atol=1e-4) for name in names) == correct
    assert dense.shape == model(x).shape


def test_batch_norm_statistics_are_corrected_at_the_last_event() -> None:
    buffers = {}
    for correct in (True, False):
        module = LIT()
        method = LowRankFactorization(
            MACs(0.5),
            schedule=Window(Linear(), start=0.2, end=0.6),
            every_n_steps=2,
            correct_batch_norm=correct,
            calibration_batches=3,
            allocation=RankAllocation(round_to=1),
        )
        trainer(method).fit(module)
        buffers[correct] = {name: b.clone() for name, b in module.named_buffers() if name.endswith("running_mean")}
        assert "inputs" not in state_of(module).state["low_rank"]
    assert differences(buffers[True], buffers[False])


def test_fisher_fit_reads_gradients_of_the_given_loss() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 4)), [torch.randn(8, 6) for _ in range(3)]
    weight = model[0].weight.detach().clone()
    squares = torch.zeros(4, 6, dtype=torch.float64)
    for x in data:  # the empirical Fisher information, batch by batch
        (gradient,) = torch.autograd.grad(model(x).square().mean(), model[0].weight)
        squares += gradient.double().square() / len(data)
    scale = squares.sum(0).sqrt()
    left, values, right = torch.linalg.svd(weight.double() * scale, full_matrices=False)
    factorize(
        model,
        data[0],
        RankRatio(0.25),
        fit=FisherSVD(),
        data=data,
        loss=lambda output, batch: output.square().mean(),
        allocation=RankAllocation(round_to=1),
    )
    found = model[0][1].weight @ model[0][0].weight
    expected = (left[:, :1] * values[:1]) @ right[:1] / scale
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "split"), [("attention", {}), ("fused_qkv", {"qkv": 3})])
def test_whitened_fit_of_split_layers_reads_their_inputs(name, split) -> None:
    """Inputs that span few directions are mapped exactly at that rank, which the weight alone is not."""
    model = ZOO[name]().eval()
    owner = "qkv" if split else next(n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
    weights = split_weights(model.get_submodule(owner), split.get(owner, 0))
    before = {f"{owner}.{part}": weight.detach().clone() for part, weight in weights.items() if part != "out_proj"}
    inputs = []
    handle = model.get_submodule(owner).register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    x = torch.randn_like(model.example[0][0][:1]).expand_as(model.example[0][0])
    model(x)
    handle.remove()
    plan = factorize(
        model,
        x,
        RankRatio(7 / 16),  # of seven tokens, or of five patches
        fit=WhitenedSVD(damping=1e-9),
        split=split,
        targets=owner,
        data=[(x,)],
        allocation=RankAllocation(round_to=1),
    )
    assert set(before) <= set(plan.layers)
    for layer, weight in before.items():
        product = dense_weight(model.get_submodule(layer))[0]
        assert plan.layers[layer].error < 1e-5
        assert not torch.allclose(product, weight, atol=1e-2)
        torch.testing.assert_close(inputs[0] @ product.T, inputs[0] @ weight.T, rtol=1e-3, atol=1e-3)


def test_a_layer_that_is_called_without_a_tensor_stays_dense() -> None:
    """Positions as Marian writes them: an embedding that is called with the size of the input."""

    class Positions(nn.Embedding):
        def forward(self, size: torch.Size) -> Tensor:
            return super().forward(torch.arange(size[1]))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.body = Positions(16, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x + self.positions(x.shape))

    plan = factorize(Net(), torch.randn(2, 5, 32), RankRatio(0.25))
    assert list(plan.layers) == ["body"]
    assert "Positions" in plan.skipped["positions"]
