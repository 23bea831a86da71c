"""Dead channels, one-shot masks, masks that follow a cut, and conversion to sparse kernels."""

from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import nn

import lightning_light as ll
from lightning_light.callback import CompressionCallback
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.measure import deflated_bytes
from lightning_light.order import Stage
from lightning_light.progress import steps_done
from lightning_light.sparsity import SRSTE
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.edit import cut
from tests.contract.bodies import Body, Momentum, module_class
from tests.contract.runs import trainer
from tests.sparsity.runs import Look, fitted, leaks, masks_of
from tests.zoo import ZOO, noise


def test_changes_of_the_masks_are_logged(tmp_path) -> None:
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    fitted(ll.WeightPruning(ll.Sparsity(0.8), every_n_steps=2), logger=logger, log_every_n_steps=1)
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    for key in ("sparsity", "churn", "dead_filters"):
        assert f"weight_pruning/{key}" in text


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "depthwise"])
def test_unread_channels_leave_and_the_outputs_stay(name) -> None:
    model = ZOO[name]().eval()
    args, kwargs = model.example
    assert ll.remove_dead_channels(model, ExampleInput(args, kwargs)) == {}
    with torch.no_grad():
        model.fc.weight[:, :3] = 0.0
    before = model(*args, **kwargs)
    removed = ll.remove_dead_channels(model, ExampleInput(args, kwargs))
    assert list(removed.values()) == [3]
    torch.testing.assert_close(model(*args, **kwargs), before)
    assert model.fc.in_features < ZOO[name]().fc.in_features


def test_a_dead_filter_that_adds_a_constant_stays_unless_asked() -> None:
    model = ZOO["plain"]().eval()
    with torch.no_grad():
        model.conv1.weight[:2] = 0.0
        model.bn1.bias[:2] = 1.0  # relu(1) goes on
    args, _ = model.example
    assert ll.remove_dead_channels(model, args) == {}
    assert model.conv1.out_channels == 8
    assert ll.remove_dead_channels(model, args, exact=False) == {"conv1": 2}
    assert model.conv1.out_channels == 6


def test_filters_that_were_masked_leave_and_the_checkpoint_knows(tmp_path) -> None:
    pruning = ll.WeightPruning(
        remaining={"features.conv1": 0.5}, pattern=ll.patterns.Filter(), targets="features.conv1"
    )
    run, module = fitted(pruning)
    removed = ll.remove_dead_channels(module, noise(2, 3, 8, 8), exact=False, optimizers=run.optimizers)
    assert removed == {"features.conv1": 8}
    assert masks_of(module)["features.conv1.weight"].shape == (8, 8, 3, 3)
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = ll.load_from_checkpoint(module_class(Body, lightning.pytorch), tmp_path / "small.ckpt")
    assert torch.equal(again.eval()(noise(2, 3, 8, 8)), module.eval()(noise(2, 3, 8, 8)))


class Cut(CompressionCallback):
    """Takes the second half of conv1's channels away in the middle of a run."""

    method, stage = "cut_half", Stage.STRUCTURED

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if steps_done(trainer) == 7 and not self.state(pl_module):
            self.state(pl_module)["done"] = True
            stay = torch.arange(0, 16, 2)
            names = ["conv1.weight", *(f"bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var"))]
            kept = {**{f"features.{name}": {0: stay} for name in names}, "features.conv2.weight": {1: stay}}
            edit = cut(
                pl_module, kept, optimizers=trainer.optimizers, averaged_models=averaged_models_of(trainer, pl_module)
            )
            self._after_surgery(trainer, pl_module, edit.entry(), "half", kept=kept)


@pytest.mark.parametrize(
    "masking",
    [
        lambda: ll.WeightPruning(ll.Sparsity(0.7), schedule=ll.OneShot(at=0.2)),
        lambda: ll.WeightPruning(
            ll.Sparsity(0.7), criterion=ll.criteria.Movement(), schedule=ll.Window(ll.schedules.Linear(), 0.0, 0.9)
        ),
        lambda: ll.WeightPruning(ll.Sparsity(0.5), schedule=ll.sparsity.Rewinding(ll.OneShot(at=0.8))),
        lambda: SRSTE(targets=ll.Targets(exclude="features.stem"), schedule=ll.OneShot(at=0.2)),
        lambda: ll.DynamicSparseTraining(
            ll.Sparsity(0.7), every_n_steps=3, schedule=ll.Window(ll.schedules.Cosine(), 0.0, 1.0)
        ),
    ],
    ids=["one_shot", "movement", "rewinding", "sr_ste", "rigl"],
)
def test_masks_are_cut_along(masking) -> None:
    callback = masking()
    callback.window = lambda max_epochs: None  # the order in the list counts, not the window
    key = type(callback).method
    seen: list[float] = []
    before: dict[str, torch.Tensor] = {}

    def look(run: Any, module: Any) -> None:
        masks = masks_of(module, key)
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        assert all(mask.shape == shapes[name] for name, mask in masks.items())
        if key != "sr_ste":
            seen.append(leaks(run, module, masks))
        if run.global_step == 7:
            before.update(masks)

    _, module = fitted(Cut(), callback, body=Momentum, look=look)
    assert max(seen, default=0.0) == 0.0
    assert module.features.conv1.out_channels == 8
    mask = masks_of(module, key)["features.conv1.weight"]
    assert mask.shape == (8, 8, 3, 3)
    if isinstance(callback.schedule, ll.OneShot) and key != "sr_ste":
        assert torch.equal(mask, before["features.conv1.weight"][::2])


def test_masks_of_an_earlier_fit_follow_structured_pruning() -> None:
    """Masks, then channels are removed while the masks hold, then more masks."""
    _, module = fitted(ll.WeightPruning(ll.Sparsity(0.5), schedule=ll.OneShot()), body=Momentum)
    seen: list[float] = []
    before = {name: int(mask.sum()) for name, mask in masks_of(module).items()}
    channels = ll.StructuredPruning(ll.Channels(0.5), schedule=ll.Window(ll.OneShot(), 0.2, 0.4))
    masks = ll.WeightPruning(ll.Sparsity(0.8), schedule=ll.Window(ll.Cubic(), 0.6, 0.9), every_n_steps=1)
    run = trainer(channels, masks, Look(lambda t, m: seen.append(leaks(t, m, masks_of(m)))))
    run.fit(module)
    assert seen == [0.0] * 12
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    assert all(mask.shape == shapes[name] for name, mask in masks_of(module).items())
    assert module.features.conv1.out_channels == 8
    assert before.keys() == masks_of(module).keys()
    assert ll.measure_sparsity(module).sparsity == pytest.approx(0.8, abs=2e-3)


def test_the_exported_file_is_sparse_and_the_masks_stay_with_the_module(tmp_path) -> None:
    class Wide(Momentum):
        def make(self) -> None:
            self.features = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.ReLU())
            self.head = nn.Linear(128, 5)

    sizes = {}
    for amount in (0.0, 0.9):
        pruning = [ll.WeightPruning(ll.Sparsity(amount), schedule=ll.OneShot())] if amount else []
        export = ll.MobileExport(tmp_path / f"{amount}.ptl", latency_runs=2)
        _, module = fitted(*pruning, export, body=Wide)
        sizes[amount] = deflated_bytes(export.path)
    masks = masks_of(module)
    weights = sum(mask.numel() for mask in masks.values())
    assert sizes[0.0] - sizes[0.9] > 0.6 * 4 * weights  # of four bytes each; dense ones hardly compress
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.9 * weights)
    seen: list[float] = []
    trainer(ll.WeightPruning(ll.Sparsity(0.9)), Look(lambda t, m: seen.append(leaks(t, m, masks)))).fit(module)
    assert seen == [0.0] * 12
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(module).items())


def test_one_shot_without_a_trainer() -> None:
    model = module_class(Body, lightning.pytorch)()
    masks = ll.prune_weights(model, None, ll.Sparsity(0.5), scope="erk")
    weights = dict(model.named_parameters())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.5 * 3444)
    assert all(not bool((weights[name] * ~mask).any()) for name, mask in masks.items())
    with pytest.raises(ValueError, match=r"expected `data`, .* \['grad'\] can be gathered, found none"):
        ll.prune_weights(model, None, ll.Sparsity(0.5), criterion=ll.Taylor())


def test_a_budget_in_the_place_of_the_example_inputs_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Write `prune_weights\(model, None, Sparsity\(amount=0.5\)\)`"):
        ll.prune_weights(nn.Linear(4, 4), ll.Sparsity(0.5))


@pytest.mark.parametrize(
    "criterion",
    [
        ll.Taylor(),
        ll.criteria.Hessian(),
        ll.criteria.SNIP(),
        ll.criteria.Wanda(),
        ll.criteria.Movement(),
        ll.criteria.Activation(),
        ll.criteria.Random(3),
    ],
    ids=lambda criterion: type(criterion).__name__,
)
def test_every_criterion_works_without_a_trainer(criterion) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    data = [(noise(4, 3, 8, 8), torch.arange(4)) for _ in range(3)]
    masks = ll.prune_weights(
        model,
        None,
        ll.Sparsity(0.5),
        criterion=criterion,
        data=data,
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        calibration_batches=2,
    )
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.5 * total)
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(parameter.detach(), old * masks[name] if name in masks else old)
        assert parameter.grad is None


def test_taylor_without_a_trainer_masks_the_smallest_products_of_weight_and_mean_gradient() -> None:
    torch.manual_seed(1)
    model, data = nn.Linear(6, 3), [(torch.randn(4, 6), torch.randn(4, 3)) for _ in range(2)]
    gradients = []
    for inputs, targets in data:
        model.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        gradients.append(model.weight.grad.clone())
    model.zero_grad()
    scores = (model.weight.detach() * (gradients[0] + gradients[1]) / 2) ** 2
    masks = ll.prune_weights(
        model,
        None,
        ll.Sparsity(0.5),
        criterion=ll.Taylor(),
        data=data,
        loss=lambda output, batch: nn.functional.mse_loss(output, batch[1]),
        calibration_batches=2,
    )
    assert scores[masks["weight"]].min() > scores[~masks["weight"]].max()


def test_sparse_kernels_are_refused_where_they_are_missing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    before = [model[0].weight, model[2].weight]
    with pytest.raises(
        ValueError, match=r"`0`: expected at most 2 nonzero weights of every 4 .* found more.*NM\(2, 4\)"
    ):
        ll.sparsity.to_semi_structured(model)
    ll.prune_weights(model, pattern=ll.NM(2, 4))
    with pytest.raises(
        UnsupportedError, match=r"`0`: expected weights on an NVIDIA GPU .* found cpu.*compressed size only"
    ):
        ll.sparsity.to_semi_structured(model)
    with pytest.raises(ValueError, match=r"`0`: expected at most 2 nonzero"):
        ll.sparsity.to_semi_structured(nn.Sequential(nn.Linear(6, 4)))
    assert [model[0].weight, model[2].weight] == before
