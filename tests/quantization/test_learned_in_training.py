"""Learned scales and bit-width schedules in a real Trainer: who trains them, and what stays of other methods."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_light.budgets import Sparsity
from lightning_light.clustering import WeightClustering
from lightning_light.errors import UnsupportedError
from lightning_light.progress import training_progress
from lightning_light.quantization import (
    LSQ,
    PACT,
    Int8,
    IntN,
    MixedPrecision,
    QuantizationAwareTraining,
    Ternary,
    fake_quantized,
)
from lightning_light.quantization.fake_quantize import dampening_gradient
from lightning_light.quantization.specs import WeightSpec
from lightning_light.schedules import Linear, OneShot, Staircase, Window
from lightning_light.sparsity import WeightPruning
from tests.contract.bodies import Body, TwoOptimizers, module_class
from tests.contract.runs import trainer
from tests.quantization.test_quantization_aware_training import IMAGES, STAGES, module


class Groups(Body):
    """The group of biases and norms comes second and has no weight decay."""

    def configure_optimizers(self) -> Any:
        several = [p for p in self.parameters() if p.ndim > 1], [p for p in self.parameters() if p.ndim < 2]  # type: ignore[attr-defined]
        groups = [{"params": several[0], "weight_decay": 0.1}, {"params": several[1], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr)


class Spy(TorchFunctionMode):
    """The weights that convolutions and linear layers compute with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in {"conv2d", "linear"}:
            self.weights.append(args[1].detach())
        return func(*args, **(kwargs or {}))


def quantized_weights(net: Any) -> list[Tensor]:
    """The weights of all layers, as they compute with them."""
    with Spy() as spy, fake_quantized(net.eval()):
        net(IMAGES)
    return spy.weights


def learned_values(net: Any, recipe: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """What was learned: at first, at the end, and the run."""
    qat, first = QuantizationAwareTraining(recipe, **{**STAGES, **options}), {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if not first:
                first.update(
                    {
                        name: value.clone()
                        for name, value in qat.state(pl_module).get("learned", {}).items()
                        if qat.state(pl_module)["enabled"]
                    }
                )

    run = trainer(qat, Look())
    run.fit(net)
    return first, qat.state(net)["learned"], run


@pytest.mark.parametrize("recipe", [LSQ(), LSQ(8, 8), LSQ(4, 4, offset=True), PACT()], ids=repr)
def test_what_is_learned_is_trained_by_the_users_optimizer(recipe) -> None:
    net: Any = module_class(Groups, pl)()
    names = set(net.state_dict())
    first, last, run = learned_values(net, recipe)
    assert first.keys() == last.keys()
    assert len(last) >= 4
    assert all(not torch.equal(first[name], last[name]) for name in last)
    assert set(net.state_dict()) == names
    decayed, plain = run.optimizers[0].param_groups
    assert len(decayed["params"]) + len(plain["params"]) == len(list(net.parameters())) + len(last)
    assert len(decayed["params"]) == 5, "they are in the group with the least weight decay"
    assert len(run.optimizers[0].state) == len(list(net.parameters())) + len(last)


def test_every_optimizer_trains_the_scales_of_its_layers() -> None:
    net: Any = module_class(TwoOptimizers, pl)()
    first, last, run = learned_values(net, LSQ())
    features, head = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in run.optimizers)
    of_head = {name for name in last if name.startswith("weight of head")} | {"activation 4: scale"}
    assert len(head) == 2 + len(of_head)
    assert len(features) == len(list(net.features.parameters())) + len(last) - len(of_head)
    assert all(not torch.equal(first[name], last[name]) for name in last)


def test_an_optimizer_that_takes_no_parameters_is_refused() -> None:
    class Quasi(Body):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())  # type: ignore[attr-defined]

    with pytest.raises(UnsupportedError, match=r"found \['LBFGS'\].*use a recipe with observers"):
        trainer(QuantizationAwareTraining(LSQ(), **STAGES)).fit(module_class(Quasi, pl)())


def test_a_second_fit_learns_again() -> None:
    net, qat = module(), QuantizationAwareTraining(LSQ(), **STAGES)
    ends = []
    for _ in range(2):
        run = trainer(qat)
        run.fit(net)
        assert len(run.optimizers[0].param_groups[0]["params"]) == len(list(net.parameters())) + 10
        ends.append({name: value.clone() for name, value in qat.state(net)["learned"].items()})
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("recipe", [LSQ(), IntN(4, 4)], ids=repr)
def test_a_bit_width_schedule(recipe) -> None:
    schedule = Window(Staircase(Linear(), steps=2), start=0.45, end=0.8)
    qat, net = QuantizationAwareTraining(recipe, bit_width_schedule=schedule, **STAGES), module()
    bits, reach = [], []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            quantizer = qat._quantizer
            if quantizer is not None and quantizer.enabled:
                bits.append(quantizer.activations[1].bits)
                reach.append(quantizer.qparams[1].scale * quantizer.activations[1].quant_max)  # type: ignore[index]

    trainer(qat, Look()).fit(net)
    assert [one for one, before in zip(bits, [0, *bits], strict=False) if one != before] == [8, 6, 4]
    changes = [place for place in range(1, len(bits)) if bits[place] != bits[place - 1]]
    ratios = [reach[place] / reach[place - 1] for place in changes]
    assert all(1 / 1.5 < ratio < 1.5 for ratio in ratios), "a range with fewer bits is as wide"


def test_masked_weights_stay_zero() -> None:
    net = module()
    pruning = WeightPruning(Sparsity(0.6), schedule=OneShot(at=0.1))
    recipe = MixedPrecision(default=LSQ(), first=Int8(), last=Ternary())
    trainer(pruning, QuantizationAwareTraining(recipe, **STAGES)).fit(net)
    kept = [p for p in net.parameters() if p.ndim > 1]
    found = quantized_weights(net)
    assert sum(int((p == 0).sum()) for p in kept) >= 0.5 * sum(p.numel() for p in kept)
    by_shape = {weight.shape: weight for weight in found}
    for weight in kept:
        assert (by_shape[weight.shape][weight == 0] == 0).all()


def test_clusters_stay_clusters() -> None:
    net = module()
    clustering = WeightClustering(8, start=0.1)
    qat = QuantizationAwareTraining(Int8(per_channel=False), **STAGES)
    trainer(clustering, qat).fit(net)
    assert all(weight.unique().numel() <= 9 for weight in quantized_weights(net))


def test_it_computes_the_same_in_the_trainer_and_after_it() -> None:
    net, qat = module(), QuantizationAwareTraining(MixedPrecision(default=LSQ(), first=Int8(), last=Int8()), **STAGES)
    seen: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            with torch.no_grad():
                seen.append(pl_module.eval()(IMAGES))
            seen.append(pl_module(IMAGES).detach())

    trainer(Look(), qat).fit(net)
    with fake_quantized(net.eval()), torch.no_grad():
        found = net(IMAGES)
    assert torch.equal(found, seen[0])
    assert torch.equal(seen[1], seen[0])


class Gradients(pl.Callback):
    """The gradient of one weight before every optimizer step, and the part of the run that is completed."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, Tensor, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        weight = pl_module.features.conv1.weight
        self.seen.append((training_progress(trainer), weight.detach().clone(), weight.grad.clone()))


def test_dampening_grows_as_half_a_cosine() -> None:
    net, before, after = module(), Gradients(), Gradients()
    qat = QuantizationAwareTraining(LSQ(dampening=0.5), **STAGES)
    scales = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            state = qat.state(pl_module)
            learned = state["learned"] if state.get("enabled") else {}
            (scale,) = [v for name, v in learned.items() if name.startswith("weight of features.conv1,")] or [None]
            scales.append(None if scale is None else scale.clone())

    trainer(before, qat, after, Look()).fit(net)
    spec = WeightSpec(4, -8, 7, learned=True, dampening=0.5)
    assert [scale is not None for scale in scales] == [False] * 5 + [True] * 7
    for scale, (progress, weight, own), (_, _, total) in zip(scales, before.seen, after.seen, strict=True):
        strength = 0.0 if scale is None else (1 - math.cos(math.pi * (progress - 0.25) / 0.75)) / 2
        penalty = torch.zeros(()) if scale is None else dampening_gradient(weight, spec, scale)
        torch.testing.assert_close(total, own + strength * penalty)
        assert scale is None or not torch.equal(total, own)
