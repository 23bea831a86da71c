"""The callback, the checkpoint converter, attention, chains; with real Trainers."""

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_light.budgets import Channels, MACs, Params, Sparsity
from lightning_light.clustering import WeightClustering
from lightning_light.errors import LightningLightError
from lightning_light.export import MobileExport
from lightning_light.lowrank import (
    EnergyKept,
    FisherSVD,
    LowRankFactorization,
    NuclearNorm,
    Orthogonality,
    OutputChange,
    RankRatio,
    WhitenedSVD,
    factorize,
    factorize_checkpoint,
)
from lightning_light.lowrank.__main__ import main
from lightning_light.lowrank.build import factor_form
from lightning_light.lowrank.regularize import add_rank_penalty
from lightning_light.measure import count_cost
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning
from lightning_light.surgery.attachment import attach, state_of
from lightning_light.surgery.checkpoint import load_from_checkpoint
from lightning_light.surgery.manifest import KEY
from tests.contract.bodies import Body, module_class
from tests.contract.runs import differences, trainer
from tests.zoo import ZOO

LIT = module_class(Body, lightning.pytorch)
EXAMPLE = (torch.zeros(1, 3, 8, 8),)
Body_lightning = LIT


def test_the_optimizer_owns_the_factors_at_the_same_place_of_the_same_group() -> None:
    class Groups(LIT):
        def configure_optimizers(self) -> Any:
            first, second = list(self.features.parameters()), list(self.head.parameters())
            return torch.optim.AdamW([{"params": first, "lr": 0.01}, {"params": second, "lr": 0.02}])

    module = Groups()
    run = trainer(LowRankFactorization(ranks=RankRatio(0.25), start=0.5, round_to=1, form="tucker2"))
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

    class Look(lightning.pytorch.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            last = pl_module.features.last
            bias = (last[-1] if isinstance(last, nn.Sequential) else last).bias
            seen.append((id(bias), float(trainer.optimizers[0].state.get(bias, {}).get("step", 0))))

    trainer(LowRankFactorization(ranks=RankRatio(0.25), start=0.5, round_to=1), Look()).fit(LIT())
    assert len({identity for identity, _ in seen}) == 1
    assert [step for _, step in seen] == list(range(12))


def test_a_gradual_course_ends_at_the_budget_and_only_goes_down() -> None:
    costs = []

    class Look(lightning.pytorch.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            costs.append(count_cost(pl_module, EXAMPLE).macs)

    module = LIT()
    dense = count_cost(module, EXAMPLE).macs
    trainer(LowRankFactorization(MACs(0.35), start=0.1, end=0.8, events=4, round_to=1), Look()).fit(module)
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) >= 4
    assert costs[-1] <= 0.35 * dense
    kinds = {
        type(part)
        for name, part in module.named_modules()
        if factor_form(module.get_submodule(name.rpartition(".")[0]))
    }
    assert kinds <= {nn.Conv2d, nn.Linear}  # factors, never factors of factors


def test_what_is_logged_and_kept_says_rank_energy_and_error(tmp_path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    module, logger = LIT(), CSVLogger(tmp_path)
    trainer(LowRankFactorization(MACs(0.5), start=0.5, round_to=1), logger=logger).fit(module)
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
        LowRankFactorization(MACs(0.6), start=0.5, round_to=1),
    ).fit(module)
    assert module.features.conv1 is not None
    factored = [name for name in dict(module.named_modules()) if factor_form(module.get_submodule(name))]
    assert factored
    assert count_cost(module, EXAMPLE).macs <= 0.6 * 0.75 * count_cost(LIT(), EXAMPLE).macs
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
            LowRankFactorization(MACs(0.6), start=0.5, round_to=1),
            WeightClustering(8, start=0.7),
        ]

    whole = LIT()
    trainer(*callbacks(), *checkpoints(tmp_path)).fit(whole)
    for step in (2, 5, 8):
        again = LIT()
        trainer(*callbacks()).fit(again, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert not differences(whole.state_dict(), again.state_dict()), step


def test_a_finished_checkpoint_is_converted_and_opens(tmp_path, capsys) -> None:
    module = LIT()
    run = trainer()
    run.fit(module)
    run.save_checkpoint(tmp_path / "dense.ckpt")
    method = LowRankFactorization(MACs(0.5), round_to=1)
    plan = factorize_checkpoint(
        LIT, tmp_path / "dense.ckpt", tmp_path / "small.ckpt", factorization=method, args=EXAMPLE
    )
    loaded = load_from_checkpoint(LIT, tmp_path / "small.ckpt")
    assert count_cost(loaded, EXAMPLE).macs == plan.after <= 0.5 * plan.before
    by_hand = load_from_checkpoint(LIT, tmp_path / "dense.ckpt")
    factorize(by_hand, EXAMPLE, factorization=method)
    assert not differences(dict(by_hand.state_dict()), dict(loaded.state_dict()))
    trainer(max_epochs=1).fit(loaded)  # and goes on training
    assert "weights_only" not in torch.load(tmp_path / "small.ckpt", weights_only=True)
    name = "tests.lowrank.test_low_rank_factorization:Body_lightning"
    sys.modules["tests.lowrank.test_low_rank_factorization"] = sys.modules[__name__]
    main(
        [
            name,
            str(tmp_path / "dense.ckpt"),
            str(tmp_path / "cli.ckpt"),
            "--macs=0.5",
            "--round_to=1",
            "--input=1,3,8,8",
        ]
    )
    assert "energy kept" in capsys.readouterr().out
    again = load_from_checkpoint(LIT, tmp_path / "cli.ckpt")
    assert not differences(
        dict(again.state_dict()), dict(load_from_checkpoint(LIT, tmp_path / "small.ckpt").state_dict())
    )


def test_a_checkpoint_with_nothing_to_factor_is_not_written(tmp_path) -> None:
    run = trainer()
    run.fit(LIT())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    method = LowRankFactorization(MACs(1.0))
    with pytest.raises(LightningLightError, match="found none, and wrote nothing"):
        factorize_checkpoint(LIT, tmp_path / "dense.ckpt", tmp_path / "x.ckpt", factorization=method, args=EXAMPLE)
    assert not (tmp_path / "x.ckpt").exists()


def test_a_factored_lightning_module_checkpoints_what_was_done_to_it(tmp_path) -> None:
    module = LIT()
    factorize(module, EXAMPLE, factorization=LowRankFactorization(MACs(0.5), round_to=1))
    run = trainer(max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "small.ckpt")
    loaded = load_from_checkpoint(LIT, tmp_path / "small.ckpt")
    assert not differences(dict(module.state_dict()), dict(loaded.state_dict()))


def test_results_outlive_the_package(tmp_path) -> None:
    model = ZOO["plain"]().eval()
    args, _ = model.example
    factorize(model, args, factorization=LowRankFactorization(ranks=RankRatio(0.3), round_to=1))
    expected = {name: type(part) for name, part in model.named_modules()}
    assert all(kind.__module__.startswith(("torch.", "tests.")) for kind in expected.values())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(*args), model(*args))
    assert factor_form(copy.deepcopy(model).conv2) is not None


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_an_opened_attention_answers_as_the_attention(batch_first, need_weights) -> None:
    from lightning_light.lowrank.attention import open_module

    for options in ({}, {"bias": False}, {"kdim": 10, "vdim": 6}):
        attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options).double().eval()
        opened = open_module(attention).eval()
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
                expected, found = attention(query, key, value, **call), opened(query, key, value, **call)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["attention", "encoder"])
def test_attention_is_factored_block_by_block_and_trains(name) -> None:
    model = ZOO[name]().eval()
    args, _ = model.example
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = LowRankFactorization(ranks=RankRatio(0.25), round_to=1)
    plan = factorize(model, args, factorization=method, optimizers=[optimizer])
    assert any(layer.endswith("q_proj") for layer in plan.layers)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    with torch.no_grad():
        model(*args)  # the encoder's fast path would ask for weights that are not there any more
    model.train()
    model(*args).sum().backward()
    optimizer.step()


def test_each_block_of_a_fused_layer_has_ranks_of_its_own() -> None:
    model = ZOO["fused_qkv"]().eval()
    args, _ = model.example
    with torch.no_grad():
        model.qkv.weight[:16] = model.qkv.weight[:16, :1] * torch.ones(16)  # the queries have rank one
    expected = model(*args)
    plan = factorize(
        model,
        args,
        factorization=LowRankFactorization(ranks=EnergyKept(0.999999), blocks={"qkv": 3}, round_to=1, targets="qkv"),
    )
    assert list(plan.layers) == ["qkv.blocks.0"]
    assert plan.layers["qkv.blocks.0"].ranks == (1,)
    torch.testing.assert_close(model(*args), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10, "vdim": 6}], ids=str)
def test_each_head_of_an_attention_has_ranks_of_its_own(options) -> None:
    class Net(LIT):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attention(query, key, value)[0]

    module = Net()
    attention = module.attention
    x = torch.randn(2, 5, 16), torch.randn(2, 7, attention.kdim), torch.randn(2, 7, attention.vdim)
    query = attention.in_proj_weight if attention.in_proj_weight is not None else attention.q_proj_weight
    with torch.no_grad():
        query[8:16] = query[8:9]  # the second head's queries have rank one
    expected = module(*x)
    optimizer = torch.optim.AdamW(module.attention.parameters())
    method = LowRankFactorization(ranks=EnergyKept(0.999999), blocks={"attention": 2}, round_to=1, targets="attention")
    plan = factorize(module, x, factorization=method, optimizers=[optimizer])
    assert {name: found.ranks for name, found in plan.layers.items()} == {"attention.q_proj.blocks.1": (1,)}
    torch.testing.assert_close(module(*x), expected, rtol=1e-4, atol=1e-5)
    owned = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(owned) == sorted(id(parameter) for parameter in module.attention.parameters())
    twin = Net()
    attach(twin).load(twin, {"state_dict": module.state_dict(), KEY: state_of(module).manifest(module)})
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(*x), module(*x))


def test_penalties_are_their_formulas() -> None:
    layer = nn.Linear(6, 4).double()
    weight = layer.weight.detach().clone().requires_grad_()
    for penalty, term in (
        (NuclearNorm(0.1), lambda w: 0.1 * torch.linalg.svdvals(w).sum()),
        (Orthogonality(0.2), lambda w: 0.1 * (w @ w.T - torch.eye(4)).square().sum()),
    ):
        (expected,) = torch.autograd.grad(term(weight), weight)
        layer.weight.grad = torch.zeros_like(layer.weight)
        add_rank_penalty(penalty, [layer], layer.parameters())
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_a_nuclear_norm_makes_the_spectrum_fall_faster() -> None:
    energies = {}
    for penalty in (None, NuclearNorm(0.05)):
        module = LIT()
        trainer(LowRankFactorization(ranks=RankRatio(0.25), start=1.0, round_to=1, penalty=penalty)).fit(module)
        facts = state_of(module).state["low_rank"]["layers"].values()
        energies[penalty] = sum(fact["energy_kept"] for fact in facts) / len(facts)
    assert energies[NuclearNorm(0.05)] > energies[None]


def test_a_dry_run_changes_nothing() -> None:
    module = LIT()
    trainer(LowRankFactorization(MACs(0.5), round_to=2, dry_run=True)).fit(module)
    assert {name: p.shape for name, p in module.named_parameters()} == {
        name: p.shape for name, p in LIT().named_parameters()
    }


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((), {}, "found neither"),
        ((MACs(0.5),), {"ranks": RankRatio()}, "found both"),
        ((Channels(0.5),), {}, "a budget of channels"),
        ((Sparsity(0.5),), {}, "a budget of zeros"),
        ((MACs(0.5),), {"form": "cp"}, "'channel', 'spatial' or 'tucker2'"),
        ((MACs(0.5),), {"round_to": 0}, "integer >= 1"),
        ((MACs(0.5),), {"start": 1.5}, "a fraction of the run"),
        ((MACs(0.5),), {"importance": "output"}, "expected `calibration`"),
        ((), {"ranks": OutputChange()}, "expected `calibration`"),
        ((), {"ranks": RankRatio(), "end": 0.5}, "in steps"),
    ],
)
def test_bad_values_are_refused_at_once(arguments, options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        LowRankFactorization(*arguments, **options)


def test_fits_that_need_what_is_not_there_are_refused() -> None:
    model = ZOO["plain"]()
    for fit, sentence in ((FisherSVD(), "which only training has"), (WhitenedSVD(), "expected `calibration`")):
        with pytest.raises(ValueError, match=sentence):
            factorize(model, model.example[0], factorization=LowRankFactorization(Params(0.5), fit=fit))


def test_an_epoch_that_never_comes_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"`LowRankFactorization\(start=7\)` counts epochs"):
        trainer(LowRankFactorization(MACs(0.5), start=7)).fit(LIT())
