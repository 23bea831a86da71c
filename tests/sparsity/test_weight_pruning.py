"""`WeightPruning` and `SRSTE` in real Trainers: exact sparsity after every step, and the schedules of the papers."""

import copy
import itertools
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

import lightning_light as ll
from lightning_light.errors import NoEffectWarning, OrderError, TargetError, UnsupportedError
from lightning_light.progress import steps_done
from lightning_light.sparsity import SRSTE
from lightning_light.surgery.attachment import state_of
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.manifest import KEY
from tests.contract.bodies import Body, FrozenBackbone, Momentum, TwoOptimizers, module_class
from tests.contract.runs import trainer
from tests.sparsity.runs import Look, fitted, leaks, masks_of

SOON = ll.Window(ll.Cubic(), start=0.1, end=0.7)
NO_STEM = ll.Targets(exclude="features.stem")
TWO_CUTS = ll.Window(ll.schedules.Staircase(ll.schedules.Linear(), 2), end=0.8)  # its first rise is at 0.4


class Falling(ll.schedules.Schedule):
    """A user's schedule that falls and does not declare it."""

    def __call__(self, progress: float) -> float:
        return 1.0 - progress


def gradual(**options: Any) -> ll.WeightPruning:
    return ll.WeightPruning(**{"budget": ll.Sparsity(0.8), "schedule": SOON, "every_n_steps": 1, **options})


def zero_fraction(module: Any) -> float:
    weights = [p.detach() for p in module.parameters() if p.ndim > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01, weight_decay=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01, weight_decay=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.01, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, centered=True, weight_decay=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.001),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01, weight_decay=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01, weight_decay=0.01),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_weight_gradient_and_state_are_zero_after_every_step(name) -> None:
    class Some(Body):
        def configure_optimizers(self) -> Any:
            return OPTIMIZERS[name](list(self.parameters()))  # type: ignore[attr-defined]

    seen: list[float] = []
    _, module = fitted(gradual(), body=Some, look=lambda t, m: seen.append(leaks(t, m, masks_of(m))))
    assert seen == [0.0] * 12
    assert zero_fraction(module) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"plugins": "fp16"},
    ],
    ids=str,
)
def test_masks_hold_under_precision_accumulation_and_clipping(options) -> None:
    if "plugins" in options:
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}
    every = options.get("accumulate_grad_batches", 1)
    seen: list[float] = []

    def look(run: Any, module: Any) -> None:
        if run.fit_loop.total_batch_idx % every == every - 1:  # within a window gradients are still whole
            seen.append(leaks(run, module, masks_of(module)))

    _, module = fitted(gradual(), body=Momentum, look=look, **options)
    assert max(seen) == 0.0
    assert zero_fraction(module) == pytest.approx(0.8, abs=1e-3)


def test_clipping_uses_the_norm_of_the_masked_gradient() -> None:
    norms: list[tuple[float, float]] = []

    class Clipping(Momentum):
        def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **_: Any) -> None:
            masks = masks_of(self)
            whole = [p.grad for p in self.parameters() if p.grad is not None]  # type: ignore[attr-defined]
            left = [p.grad * masks[n] if n in masks else p.grad for n, p in self.named_parameters()]  # type: ignore[attr-defined]
            norms.append((float(sum(g.square().sum() for g in whole)), float(sum(g.square().sum() for g in left))))

    fitted(gradual(), body=Clipping, gradient_clip_val=0.1)
    assert all(whole == left for whole, left in norms)


def test_masks_hold_after_steps_that_bypass_lightnings_hook() -> None:
    class Raw(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizers = self.optimizers(use_pl_optimizer=False)  # type: ignore[attr-defined]
            loss = self.loss(batch)
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)  # type: ignore[attr-defined]
            for optimizer in optimizers:
                optimizer.step()

    seen: list[float] = []
    fitted(
        gradual(schedule=ll.OneShot()), body=Raw, look=lambda t, m: seen.append(leaks(t, m, masks_of(m))), max_steps=12
    )
    assert max(seen) == 0.0


@pytest.mark.parametrize("amount", [0.3, 0.9])
def test_the_sparsity_follows_zhu_and_gupta(amount) -> None:
    """``s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (n dt)) ** 3``, with ``s_i = 0``."""
    found: dict[int, float] = {}

    def look(run: Any, module: Any) -> None:
        masks = masks_of(module)
        total = sum(p.numel() for p in module.parameters() if p.ndim > 1)
        found[steps_done(run)] = sum(int((~mask).sum()) for mask in masks.values()) / total

    fitted(gradual(budget=ll.Sparsity(amount), schedule=ll.Window(ll.Cubic(), 0.25, 0.75)), look=look)
    for step, sparsity in found.items():
        t = min(max(step / 12, 0.25), 0.75)
        expected = amount + (0.0 - amount) * (1 - (t - 0.25) / 0.5) ** 3
        assert sparsity == pytest.approx(expected, abs=1e-3)


def test_every_n_steps_lie_between_two_changes_and_the_last_is_on_time() -> None:
    changes: list[int] = []
    before: dict[str, Any] = {}

    def look(run: Any, module: Any) -> None:
        masks = masks_of(module)
        if masks is not before.get("masks"):
            changes.append(steps_done(run))
        before["masks"] = masks

    fitted(gradual(every_n_steps=3, schedule=ll.Window(ll.schedules.Linear(), 0.0, 1.0)), look=look)
    changes = [step for step in changes if step > 0]
    assert changes[-1] == 11  # the last step counts as the end
    assert all(b - a >= 3 for a, b in itertools.pairwise(changes[:-1]))


def test_the_state_dict_has_the_keys_and_hooks_it_had(tmp_path) -> None:
    run, module = fitted(gradual())
    fresh = type(module)()
    assert list(module.state_dict()) == list(fresh.state_dict())
    assert [type(m) for m in module.modules()] == [type(m) for m in fresh.modules()]
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert zero_fraction(fresh) == pytest.approx(0.8, abs=1e-3)
    assert all(mask.dtype == torch.bool for mask in checkpoint[KEY]["state"]["weight_pruning"]["masks"].values())
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)
    assert zero_fraction(copy.deepcopy(module)) == zero_fraction(module)


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_averaged_model_is_masked(order) -> None:
    seen: list[float] = []
    average = EMAWeightAveraging(decay=0.9)
    callbacks = [average, gradual()] if order == "before" else [gradual(), average]

    def look(run: Any, module: Any) -> None:
        for averaged_model in averaged_models_of(run, module):
            parameters = dict(averaged_model.named_parameters())
            seen.append(
                max([0.0, *(float((parameters[n].detach() * ~m).abs().max()) for n, m in masks_of(module).items())])
            )

    _, module = fitted(*callbacks, look=look)
    assert seen
    assert max(seen) == 0.0
    assert zero_fraction(module) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_averaged_model_of_sr_ste_ends_with_the_pattern(order) -> None:
    pruning = SRSTE(ll.NM(2, 4), targets=NO_STEM, decay=0.1, schedule=SOON)
    average = EMAWeightAveraging(decay=0.5)
    _, module = fitted(*([average, pruning] if order == "before" else [pruning, average]), body=Momentum)
    assert_two_of_four(module, "sr_ste")


def assert_two_of_four(module: Any, key: str) -> None:
    for name, mask in masks_of(module, key).items():
        weight = module.get_parameter(name).detach()
        groups = (weight != 0).movedim(1, -1).reshape(-1, 4)
        assert int(groups.sum(dim=1).max()) <= 2
        assert not bool((weight * ~mask).any())


@pytest.mark.parametrize(
    "pruning",
    [ll.WeightPruning(pattern=ll.NM(2, 4), targets=NO_STEM, schedule=ll.OneShot()), SRSTE(targets=NO_STEM)],
    ids=lambda pruning: pruning.method,
)
def test_n_of_m_holds_after_every_step(pruning) -> None:
    _, module = fitted(pruning, look=lambda t, m: assert_two_of_four(m, pruning.method))
    assert len(masks_of(module, pruning.method)) == 4


def test_sr_ste_is_the_papers_update() -> None:
    """Zhou et al., 2021, eq. 8: ``w <- w - lr * (g(w~) + decay * (1 - mask) * w)``; here for plain SGD in float64."""

    class Plain(Body):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.3)  # type: ignore[attr-defined]

    def run(callbacks: list[Any]) -> Any:
        return fitted(*callbacks, body=Plain, precision="64-true", max_epochs=1)[1]

    module = run([SRSTE(ll.NM(2, 4), targets="head", decay=0.5)])
    torch.manual_seed(3)
    twin = type(module)().double()
    dense = twin.head.weight.detach().clone()

    def two_of_four(w: torch.Tensor) -> torch.Tensor:
        groups = w.abs().reshape(-1, 4)
        return (groups >= groups.sort(dim=1).values[:, 2:3]).reshape(w.shape)

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3)
    for images, labels in twin.train_dataloader():
        mask = two_of_four(dense)
        twin.head.weight.data = dense * mask
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(images.double()), labels).backward()
        gradient = twin.head.weight.grad.clone()
        optimizer.step()
        dense = dense - 0.3 * (gradient + 0.5 * ~mask * dense)
    trained = state_of(module).state["sr_ste"]["per_weight"]["dense"]["head.weight"]
    torch.testing.assert_close(trained, dense, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(module.head.weight.detach(), dense * two_of_four(dense), rtol=1e-12, atol=1e-14)


def test_ac_dc_alternates_and_grows_from_zero() -> None:
    """Sparse, dense, sparse, dense, sparse: the masks of two sparse phases differ, and the last phase is sparse."""
    shares, first = [], {}

    def look(run: Any, module: Any) -> None:
        shares.append(zero_fraction(module))
        first.setdefault(len(shares), masks_of(module))

    _, module = fitted(
        ll.WeightPruning(ll.Sparsity(0.5), schedule=ll.sparsity.Alternating(phases=2, start=0.25, end=0.95)),
        body=Momentum,
        look=look,
    )
    sparse = [share > 0.4 for share in shares]
    assert sparse == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2 + [False] + [True]
    assert zero_fraction(module) == pytest.approx(0.5, abs=1e-3)


def test_dense_sparse_dense_ends_dense() -> None:
    shares: list[float] = []
    fitted(
        ll.WeightPruning(ll.Sparsity(0.3), schedule=ll.sparsity.DenseSparseDense(0.25, 0.75)),
        look=lambda t, m: shares.append(zero_fraction(m) if masks_of(m) else 0.0),
    )
    assert [round(share, 2) for share in shares] == [0.0] * 3 + [0.3] * 6 + [0.0] * 3


@pytest.mark.parametrize(
    ("rewind_to", "rounds"), [(0.0, ll.OneShot(at=0.5)), (0.2, ll.OneShot(at=0.5)), (0.2, TWO_CUTS)]
)
def test_rewinding_resets_the_remaining_weights(rewind_to, rounds) -> None:
    """Frankle & Carbin, 2019: ``f(x; m * theta_k)``; the optimizer state is reset as well."""
    steps: list[dict[str, torch.Tensor]] = []
    torch.manual_seed(3)
    schedule = ll.sparsity.Rewinding(rounds, rewind_to=rewind_to)
    rewound: dict[str, Any] = {}
    masks: dict[str, torch.Tensor] = {}

    class Before(ll.WeightPruning):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            steps.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if masks_of(pl_module) and not rewound:
                rewound.update({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})
                masks.update({name: mask.clone() for name, mask in masks_of(pl_module).items()})
                moments = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
                assert moments
                assert not any(bool(v.any()) for v in moments)

    fitted(Before(ll.Sparsity(0.5), schedule=schedule))
    origin = steps[0 if rewind_to == 0.0 else 3]
    assert rewound
    for name, tensor in rewound.items():
        if name in masks:
            assert torch.equal(tensor, origin[name] * masks[name])
        elif tensor.is_floating_point():
            assert torch.equal(tensor, origin[name])


def test_lottery_rounds_remove_the_same_fraction_of_the_remaining_weights() -> None:
    schedule = ll.sparsity.Rewinding()
    left = [1.0 - 0.9 * schedule(round_ / 6) for round_ in range(6)]
    assert left == pytest.approx([0.1 ** (round_ / 5) for round_ in range(6)], abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*had no effect")
def test_movement_accumulates_weight_times_gradient() -> None:
    """Sanh et al., 2020, eq. 4: ``S = -sum_t (dL/dW * W)``, the learning rate left out."""
    expected: dict[str, torch.Tensor] = {}

    class Sums(Momentum):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for name, p in self.named_parameters():  # type: ignore[attr-defined]
                if p.ndim > 1:
                    expected[name] = expected.get(name, 0.0) - p.detach() * p.grad

    _, module = fitted(gradual(criterion=ll.criteria.Movement(), schedule=ll.OneShot(at=0.9)), body=Sums, max_epochs=1)
    # the cut is before the last of four steps
    _, three = fitted(
        gradual(criterion=ll.criteria.Movement(), schedule=ll.OneShot(at=0.9)), body=Sums, max_epochs=1, max_steps=4
    )
    found = state_of(three).state["weight_pruning"]["evidence"]["movement"]
    assert found.keys() == {name for name, p in three.named_parameters() if p.ndim > 1}
    assert torch.equal(
        found["head.weight"], state_of(module).state["weight_pruning"]["evidence"]["movement"]["head.weight"]
    )


def test_data_dependent_scores_use_the_dense_gradient() -> None:
    """Taylor on a network whose masks exist already still has evidence on everything."""
    _, module = fitted(gradual(criterion=ll.Taylor(), calibration_batches=1), body=Momentum)
    assert zero_fraction(module) == pytest.approx(0.8, abs=1e-3)


def test_wanda_scores_weight_times_norm_of_its_input() -> None:
    class Linear(Body):
        def make(self) -> None:
            self.features = nn.Flatten()
            self.head = nn.Linear(192, 5)

    seen: list[torch.Tensor] = []  # after each step
    pruning = ll.WeightPruning(
        ll.Sparsity(0.5),
        criterion=ll.criteria.Wanda(),
        schedule=ll.OneShot(at=0.5),
        scope="local",
        calibration_batches=2,
    )
    _, module = fitted(
        pruning, body=Linear, max_epochs=1, look=lambda t, m: seen.append(m.head.weight.detach().clone())
    )
    (mask,) = masks_of(module).values()
    batches = [images for images, _ in module.train_dataloader()]
    step = next(place for place, weight in enumerate(seen) if bool((weight == 0).any()))
    norm = torch.cat([batch.flatten(1) for batch in batches[step - 2 : step]]).norm(dim=0)
    score = seen[step - 1].abs() * norm
    assert score[mask].min() >= score[~mask].max() - 1e-5


# Refusals and warnings.


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: ll.WeightPruning(), ValueError, "expected a budget, `remaining`, or an N:M pattern"),
        (lambda: ll.WeightPruning(ll.Sparsity(1.0)), ValueError, "no weight would remain"),
        (lambda: ll.WeightPruning(ll.MACs(0.5)), TypeError, "expected a Sparsity or None, found MACs"),
        (lambda: ll.WeightPruning(0.9), TypeError, "expected a Sparsity or None, found float 0.9"),
        (lambda: ll.WeightPruning(remaining={"head": 0.0}), ValueError, "0 < value <= 1"),
        (lambda: ll.WeightPruning(ll.Sparsity(0.9), scope="layer"), ValueError, "expected one of 'local', 'global'"),
        (lambda: ll.WeightPruning(ll.Sparsity(0.9), every_n_steps=0), ValueError, "expected an integer >= 1"),
        (lambda: ll.WeightPruning(ll.Sparsity(0.9), pattern=ll.NM(2, 4)), ValueError, "expected no other budget"),
        (lambda: ll.WeightPruning(ll.Sparsity(0.9), criterion="l1"), TypeError, "expected a Criterion, found str"),
        (
            lambda: ll.WeightPruning(ll.Sparsity(0.9), criterion=ll.Magnitude),
            TypeError,
            r"Pass an instance: `Magnitude",
        ),
        (lambda: ll.WeightPruning(ll.Sparsity(0.9), schedule=0.5), TypeError, "expected a Schedule"),
        (lambda: ll.WeightPruning(ll.Sparsity(0.9), schedule=Falling()), ValueError, "expected a schedule that rises"),
        (lambda: SRSTE(decay=-1.0), ValueError, "expected a number >= 0"),
        (lambda: SRSTE(schedule=ll.sparsity.Alternating()), ValueError, "expected a schedule that rises"),
        (lambda: ll.sparsity.Alternating(phases=0), ValueError, "expected an integer >= 1"),
        (lambda: ll.sparsity.DenseSparseDense(0.7, 0.3), ValueError, "expected start < end"),
        (lambda: ll.sparsity.Rewinding(rewind_to=2.0), ValueError, "expected 0 <= rewind_to < 1"),
        (lambda: ll.sparsity.Rewinding(rewind_to=1.0), ValueError, "expected 0 <= rewind_to < 1"),
    ],
)
def test_bad_values_are_refused_where_they_are_written(make, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        make()


def refused(error: Any, sentence: str, *callbacks: Any, body: type[Body] = Body) -> None:
    module = module_class(body, lightning.pytorch)()
    with pytest.raises(error, match=sentence):
        trainer(*callbacks).fit(module)


def test_an_impossible_pattern_names_the_layer() -> None:
    refused(
        TargetError, r"on `features.stem`: expected .* divisible by 4, found 3", ll.WeightPruning(pattern=ll.NM(2, 4))
    )


def test_two_that_mask_one_weight_are_refused() -> None:
    refused(
        OrderError,
        r"found 2 that both mask: \['features.conv1.weight'",
        gradual(targets="features.conv*"),
        ll.DynamicSparseTraining(ll.Sparsity(0.5), targets=["features.conv*", "head"]),
    )


def test_two_callbacks_mask_different_layers() -> None:
    other = ll.WeightPruning(ll.Sparsity(0.5), targets="head", schedule=SOON)
    _, module = fitted(gradual(targets="features.*"), other)
    assert list(masks_of(module, "weight_pruning#2")) == ["head.weight"]
    assert len(masks_of(module)) == 4


def test_evidence_that_a_layer_cannot_give_is_refused() -> None:
    refused(UnsupportedError, "found frozen ones", gradual(criterion=ll.Taylor()), body=FrozenBackbone)


def test_rewinding_to_a_moment_after_the_first_cut_is_refused() -> None:
    late = ll.sparsity.Rewinding(ll.OneShot(at=0.2), rewind_to=0.5)
    refused(ValueError, "before the first rise of the schedule", gradual(schedule=late))
    refused(
        ValueError,
        "the ticket would not be trained",
        gradual(schedule=ll.sparsity.Rewinding(ll.schedules.Staircase(ll.schedules.Linear(), 2))),
    )


def test_a_layer_without_evidence_is_named() -> None:
    class Unused(Body):
        def make(self) -> None:
            super().make()
            self.unused = nn.Linear(4, 4)

    with pytest.raises(UnsupportedError, match=r"on `unused.weight`: expected grad from \d+ batches, found none"):
        fitted(gradual(criterion=ll.criteria.SNIP(), calibration_batches=1), body=Unused)


def test_torchs_own_masks_are_refused() -> None:
    class Masked(Body):
        def make(self) -> None:
            super().make()
            nn.utils.prune.random_unstructured(self.head, "weight", 0.5)

    with pytest.raises(UnsupportedError, match=r"found a mask of `torch.nn.utils.prune` on `head`"):
        fitted(gradual(), body=Masked)


def test_a_run_without_effect_warns() -> None:
    with pytest.warns(NoEffectWarning, match=r"WeightPruning.*masks less than one weight"):
        fitted(gradual(budget=ll.Sparsity(0.0)))
    with pytest.warns(NoEffectWarning, match="the run ended before the first change"):
        fitted(gradual(criterion=ll.Taylor(), calibration_batches=99))


def test_masks_that_are_loaded_after_the_last_change_are_extended_to_the_budget() -> None:
    stored: dict[str, Any] = {}
    shares: list[float] = []

    def look(run: Any, module: Any) -> None:
        masks = masks_of(module).values()
        shares.append(1.0 - sum(int(mask.sum()) for mask in masks) / max(sum(mask.numel() for mask in masks), 1))
        if steps_done(run) == 3:
            module.on_save_checkpoint(stored)
        if steps_done(run) == 10:
            module.on_load_checkpoint(stored)
            assert len(masks_of(module)) == 5

    fitted(gradual(), look=look)
    assert 0.0 < shares[3] < 0.5
    assert shares[10] == shares[11] == pytest.approx(0.8, abs=1e-3)


def test_a_second_fit_keeps_the_masks_that_hold() -> None:
    _, module = fitted(gradual())
    shares: list[float] = []
    trainer(gradual(), Look(lambda t, m: shares.append(zero_fraction(m)))).fit(module)
    assert min(shares) == pytest.approx(0.8, abs=1e-3)
    with torch.no_grad():
        module.head.weight.fill_(1.0)
    trainer(gradual(targets="head", schedule=ll.OneShot(at=0.9))).fit(module)
    assert int((module.head.weight == 0).sum()) == round(0.8 * 60)


def test_training_on_without_the_callback_leaves_no_false_mask_in_a_checkpoint(tmp_path) -> None:
    _, module = fitted(gradual())
    run = trainer()
    run.fit(module)
    assert zero_fraction(module) < 0.1
    with pytest.warns(UserWarning, match=r"masks of `weight_pruning` no longer hold on 5 weights"):
        run.save_checkpoint(tmp_path / "dense.ckpt")
    checkpoint = torch.load(tmp_path / "dense.ckpt", weights_only=True)
    assert checkpoint[KEY]["state"]["weight_pruning"]["masks"] == {}
