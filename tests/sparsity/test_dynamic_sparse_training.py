"""`DynamicSparseTraining` in real Trainers: constant sparsity, and updates at the steps of the schedule."""

from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_light as ll
from lightning_light.errors import NoEffectWarning, UnsupportedError
from lightning_light.surgery.attachment import state_of
from tests.contract.bodies import Body, FrozenBackbone, Momentum, module_class
from tests.contract.runs import trainer
from tests.sparsity.runs import fitted, leaks, masks_of

RIGL = ll.RigL()
KEY = "dynamic_sparse_training"


def sparse(method: Any = RIGL, **options: Any) -> ll.DynamicSparseTraining:
    schedule = ll.Window(ll.schedules.Cosine(), options.pop("start", 0.0), options.pop("end", 1.0))
    options = {"every_n_steps": 2, "schedule": schedule, **options}
    return ll.DynamicSparseTraining(ll.Sparsity(0.8), method=method, **options)


def counts(module: Any) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks_of(module, KEY).items()}


@pytest.mark.parametrize("scope", ["erk", "local", "global"])
@pytest.mark.parametrize("method", [ll.sparsity.SET(), ll.RigL(), ll.sparsity.Static()], ids=str)
def test_the_sparsity_is_exact_at_every_step_and_nothing_leaks(method, scope) -> None:
    seen: list[dict[str, int]] = []

    def look(run: Any, module: Any) -> None:
        assert leaks(run, module, masks_of(module, KEY)) == 0.0
        seen.append(counts(module))

    fitted(sparse(method, scope=scope), body=Momentum, look=look)
    assert len(seen) == 12
    assert all(found == seen[0] for found in seen)
    total = 3444
    exact = round(0.2 * total) if scope != "local" else None
    if exact is not None:
        assert sum(seen[0].values()) == total - round(0.8 * total) == pytest.approx(exact, abs=1)


@pytest.mark.parametrize("method", [ll.sparsity.SRigL(), ll.sparsity.SRigL(fraction=0.9, min_salient=0.9)], ids=str)
def test_the_fan_in_is_one_number_at_every_step(method) -> None:
    def look(run: Any, module: Any) -> None:
        assert leaks(run, module, masks_of(module, KEY)) == 0.0
        for mask in masks_of(module, KEY).values():
            fan_ins = mask.flatten(1).sum(dim=1)
            assert len(set(fan_ins[fan_ins > 0].tolist())) == 1

    fitted(sparse(method), look=look)


def test_static_keeps_its_masks_and_others_update_them() -> None:
    moved = {}
    for method in (ll.sparsity.Static(), ll.sparsity.SET(), ll.RigL(), ll.sparsity.SRigL()):
        first: dict[str, torch.Tensor] = {}
        _, module = fitted(sparse(method), look=lambda t, m, first=first: first or first.update(masks_of(m, KEY)))
        moved[type(method).__name__] = any(
            not torch.equal(first[name], mask) for name, mask in masks_of(module, KEY).items()
        )
    assert moved == {"Static": False, "SET": True, "RigL": True, "SRigL": True}


def test_rigl_grows_where_the_dense_gradient_of_the_step_before_was_largest() -> None:
    """The gradient is that of the whole weight at the masked weights, before it is masked; new weights are zero."""
    dense: list[torch.Tensor] = []
    after: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class Watching(Momentum):
        def on_after_backward(self) -> None:
            dense.append(self.features.conv1.weight.grad.clone())

    class Seen(ll.DynamicSparseTraining):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            before = masks_of(pl_module, KEY).get("features.conv1.weight")
            weight = pl_module.features.conv1.weight.detach().clone()
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            now = masks_of(pl_module, KEY)["features.conv1.weight"]
            if before is not None and before is not now:
                after.append((before, weight, now))
                assert not bool(pl_module.features.conv1.weight.detach()[now & ~before].any())
                moments = trainer.optimizers[0].state[pl_module.features.conv1.weight]["momentum_buffer"]
                assert not bool(moments[now & ~before].any())

    schedule = ll.Window(ll.schedules.Cosine(), 0.0, 0.5)
    fitted(Seen(ll.Sparsity(0.8), every_n_steps=5, schedule=schedule), body=Watching)
    (before, weight, now), (last, _, unchanged) = after
    assert torch.equal(last, unchanged)  # at the end of the schedule the fraction is zero
    progress = (5 / 12) / 0.5
    count = int(0.3 / 2 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item()) * int(before.sum()))
    order = torch.where(before, weight.abs(), torch.inf).flatten().argsort()
    survivors = before.clone()
    survivors.view(-1)[order[:count]] = False
    grown = torch.where(survivors, -torch.inf, dense[4].abs()).flatten().argsort(descending=True)[:count]
    expected = survivors.clone()
    expected.view(-1)[grown] = True
    assert torch.equal(now, expected)


def test_an_accumulated_gradient_is_the_sum_of_its_window() -> None:
    _, module = fitted(sparse(every_n_steps=1), accumulate_grad_batches=2)
    assert state_of(module).state[KEY]["updates"] == 5
    assert "gradients" not in state_of(module).state[KEY].get("per_weight", {})


def test_updates_end_with_the_schedule() -> None:
    _, module = fitted(sparse(every_n_steps=1, end=0.5))
    assert state_of(module).state[KEY]["updates"] == 6
    _, module = fitted(sparse(every_n_steps=1, start=1, end=2))
    assert state_of(module).state[KEY]["updates"] == 4


def test_updates_resume_when_the_data_has_become_longer() -> None:
    class Growing(Body):
        def train_dataloader(self) -> Any:
            batches = super().train_dataloader().batches * (1 if self.current_epoch == 0 else 10)
            return DataLoader(batches, batch_size=None)

    looked: list[int] = []

    def look(run: Any, module: Any) -> None:
        looked.append(state_of(module).state[KEY].get("updates", 0))

    fitted(
        sparse(every_n_steps=1, end=0.25), body=Growing, look=look, max_epochs=2, reload_dataloaders_every_n_epochs=1
    )
    assert looked[:4] == [0, 1, 2, 2]  # of 8 steps, so far
    assert looked[-1] == looked[20] == 2 + 16  # of 80; the first gradient is that of step 5


def test_seeds_differ_and_repeat() -> None:
    first, again, other = (masks_of(fitted(sparse(seed=seed))[1], KEY) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", [ll.RigL(), ll.sparsity.SRigL(), ll.sparsity.SET()], ids=str)
def test_growing_in_a_frozen_layer_is_refused(method) -> None:
    module = module_class(FrozenBackbone, lightning.pytorch)()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UnsupportedError, match=r"found frozen ones.*\['features.stem', 'features.conv1'\].*Exclude"):
        trainer(sparse(method)).fit(module)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    _, module = fitted(sparse(method, targets=["head", "features.last"]), body=FrozenBackbone)
    assert set(counts(module)) == {"features.last.weight", "head.weight"}


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    class Unused(Body):
        def make(self) -> None:
            super().make()
            self.unused = nn.Linear(4, 4)

    with pytest.warns(NoEffectWarning, match=r"no connection was replaced: no gradient reached \['unused'\]"):
        fitted(sparse(), body=Unused)


def test_a_run_without_effect_warns() -> None:
    with pytest.warns(NoEffectWarning, match="masks less than one weight"):
        fitted(ll.DynamicSparseTraining(ll.Sparsity(0.0)))


def test_its_repr_makes_an_equal_one() -> None:
    callback = sparse(ll.sparsity.SRigL(min_salient=0.5), start=0.1)
    names = {**vars(ll.sparsity), **vars(ll.schedules), "Sparsity": ll.Sparsity}
    again = eval(repr(callback), names)
    assert repr(again) == repr(callback)
    assert "method=SRigL(fraction=0.3, min_salient=0.5)" in repr(callback)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: ll.DynamicSparseTraining(ll.MACs(0.5)), TypeError, "expected a Sparsity, found MACs"),
        (lambda: ll.DynamicSparseTraining(ll.Sparsity(1.0)), ValueError, "no weight would remain"),
        (lambda: sparse("rigl"), TypeError, r"expected a DynamicMethod, found str 'rigl'. Write `method=RigL"),
        (lambda: sparse(scope="all"), ValueError, "expected one of"),
        (lambda: sparse(every_n_steps=0), ValueError, "expected an integer >= 1"),
        (lambda: sparse(start=0.9, end=0.5), ValueError, "expected start < end"),
        (lambda: sparse(criterion=ll.Taylor()), UnsupportedError, "expected a criterion that needs some of"),
        (lambda: sparse(schedule=ll.sparsity.Alternating()), ValueError, "expected a schedule that rises"),
    ],
)
def test_bad_values_are_refused_where_they_are_written(make, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        make()
