"""Stages in a real Trainer: what is seen when, what is refused, and that the user's module stays theirs."""

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lightning_light
from lightning_light.budgets import MACs
from lightning_light.errors import LightningLightError, NoEffectWarning, OrderError, TargetError, UnsupportedError
from lightning_light.export import MobileExport, TorchScriptLite
from lightning_light.int8 import quantizers_of
from lightning_light.quantization import Int8, IntN, MovingAverage, QuantizationAwareTraining, fake_quantized
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.op_calls import OpId
from lightning_light.schedules import Linear, Window
from lightning_light.structured import StructuredPruning
from tests.contract.bodies import Body, module_class
from tests.contract.runs import differences, trainer

STAGES: dict[str, Any] = {"start": 0.25, "calibration_batches": 2, "freeze_observers": 0.75, "freeze_batch_norm": 0.75}
IMAGES = Body.train_dataloader(None).batches[0][0]  # type: ignore[arg-type]


def module() -> Any:
    return module_class(Body, pl)()


class Diary(pl.Callback):
    """The state after every batch."""

    def __init__(self, qat: QuantizationAwareTraining) -> None:
        self.qat, self.enabled, self.ranges, self.means = qat, [], [], []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = self.qat.state(pl_module)
        self.enabled.append(state.get("enabled"))
        self.ranges.append(state["ranges"].clone() if "ranges" in state else None)
        self.means.append(pl_module.features.bn1.running_mean.clone())


def test_the_stages_come_in_order() -> None:
    qat = QuantizationAwareTraining(Int8(observer=MovingAverage(0.5)), **STAGES)
    diary, net = Diary(qat), module()
    trainer(qat, diary).fit(net)
    assert diary.enabled == [None] * 3 + [False] * 2 + [True] * 7
    moved = [not torch.equal(first, second) for first, second in zip(diary.ranges[3:], diary.ranges[4:], strict=False)]
    assert moved == [True] * 5 + [False] * 3, "ranges stay from progress 0.75 on"
    moved = [not torch.equal(first, second) for first, second in zip(diary.means, diary.means[1:], strict=False)]
    assert moved == [True] * 8 + [False] * 3, "so do the statistics of folded batch norms"
    assert set(net.state_dict()) == set(module().state_dict())


def test_validation_and_sanity_checks_are_never_observed() -> None:
    ends = []
    for validation in ({"limit_val_batches": 0}, {"limit_val_batches": 4, "num_sanity_val_steps": 2}):
        qat, net = QuantizationAwareTraining(Int8(), **{**STAGES, "start": 0.0}), module()
        net.example_input_array = IMAGES
        diary = Diary(qat)
        trainer(qat, diary, **validation).fit(net)
        ends.append({"ranges": diary.ranges[-1], **net.state_dict()})
    assert not differences(*ends)


def test_an_example_input_lets_the_first_batch_be_observed() -> None:
    qat, net = QuantizationAwareTraining(Int8(), **{**STAGES, "start": 0.0}), module()
    net.example_input_array = IMAGES
    diary = Diary(qat)
    trainer(qat, diary).fit(net)
    assert diary.enabled[:3] == [False, False, True]
    first = diary.ranges[0][0].tolist()
    assert first == [IMAGES.min().item(), IMAGES.max().item()]


def test_the_network_is_quantized_in_the_trainer_and_float_after_it() -> None:
    qat, net = QuantizationAwareTraining(Int8(observer=MovingAverage(0.9)), **STAGES), module()
    seen: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.eval()
            seen.append(pl_module(IMAGES).detach())
            pl_module.train()

    run = trainer(Look(), qat)
    run.fit(net)
    net.eval()
    plain = net(IMAGES).detach()
    with fake_quantized(net) as same:
        assert same is net
        quantized = net(IMAGES).detach()
        (quantizer,) = quantizers_of(net)
        assert isinstance(quantizer, FakeQuantizer)
        activation = quantizer.plan.outputs[OpId("head", 1, "linear", 1)]
        qparams = quantizer.qparams[activation]
        assert qparams is not None
    assert torch.equal(quantized, seen[0])
    assert not torch.equal(plain, quantized)
    assert torch.equal(net(IMAGES), plain)
    low, high = qat.state(net)["ranges"][activation].clamp(torch.tensor([-1e9, 0.0]), torch.tensor([0.0, 1e9])).tolist()
    assert qparams.scale == pytest.approx((high - low) / 255)
    steps = quantized.double() / qparams.scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("average_first", [False, True])
def test_averaged_weights_are_quantized_in_validation_and_float_after_the_run(average_first) -> None:
    seen: list[Tensor] = []

    class Look(pl.Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(pl_module(IMAGES).detach())
            seen.append(pl_module.head.weight.detach().clone())

    average, qat, net = (
        pl.callbacks.EMAWeightAveraging(decay=0.5),
        QuantizationAwareTraining(Int8(), **STAGES),
        module(),
    )
    beside = [Look(), average, qat] if average_first else [Look(), qat, average]  # looks while the average is in place
    trainer(*beside).fit(net)
    quantized, averaged = seen[-2:]
    assert torch.equal(net.head.weight, averaged)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in net.modules())
    net.eval()
    assert not torch.equal(net(IMAGES), quantized)
    with fake_quantized(net), torch.no_grad():
        assert torch.equal(net(IMAGES), quantized)


def test_copies_made_inside_stay_quantized_and_others_do_not() -> None:
    net = module()
    trainer(QuantizationAwareTraining(Int8(), **STAGES)).fit(net)
    net.eval()
    outside, plain = copy.deepcopy(net), net(IMAGES)
    with fake_quantized(net):
        inside, pickled, quantized = copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net(IMAGES)
    assert torch.equal(net(IMAGES), plain)
    assert torch.equal(outside(IMAGES), plain)
    assert torch.equal(inside(IMAGES), quantized)
    assert torch.equal(pickled(IMAGES), quantized)
    with fake_quantized(outside):
        assert torch.equal(outside(IMAGES), quantized)


def test_a_loaded_checkpoint_can_be_quantized_without_a_trainer(tmp_path) -> None:
    net = module()
    run = trainer(QuantizationAwareTraining(Int8(), **STAGES))
    run.fit(net)
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = lightning_light.load_from_checkpoint(type(net), tmp_path / "last.ckpt")
    with fake_quantized(net), fake_quantized(loaded):
        assert torch.equal(net.eval()(IMAGES), loaded.eval()(IMAGES))
    with pytest.raises(LightningLightError, match=r"`QuantizationAwareTraining` has trained"):
        fake_quantized(module()).__enter__()


def test_validate_quantizes_too() -> None:
    qat, net = QuantizationAwareTraining(Int8(), **STAGES), module()
    run = trainer(qat)
    run.fit(net)
    (within,) = run.validate(net, verbose=False)
    (plain,) = trainer().validate(net, verbose=False)
    with fake_quantized(net):
        (by_hand,) = trainer().validate(net, verbose=False)
    assert within == by_hand
    assert within != plain


def test_masks_survive() -> None:
    class Masked(Body):
        def make(self) -> None:
            super().make()
            prune.l1_unstructured(self.features.conv1, "weight", amount=0.5)

    net = module_class(Masked, pl)()
    zero = net.features.conv1.weight_mask == 0
    seen: list[Tensor] = []
    conv2d = nn.functional.conv2d

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is conv2d and args[1].shape == zero.shape:
                seen.append(args[1].detach())
            return func(*args, **(kwargs or {}))

    trainer(QuantizationAwareTraining(Int8(), **STAGES)).fit(net)
    with Spy(), fake_quantized(net):
        net(IMAGES)
    assert seen
    assert all((weight[zero] == 0).all() for weight in seen)
    assert seen[0][~zero].count_nonzero() > 0


def test_pruning_after_the_start_is_refused_with_the_right_order() -> None:
    late = StructuredPruning(MACs(0.5), schedule=Window(Linear(), start=0.2, end=0.6))
    with pytest.raises(OrderError, match="expected StructuredPruning, QuantizationAwareTraining in this order"):
        trainer(late, QuantizationAwareTraining(Int8(), start=0.4)).fit(module())


def test_pruning_before_it_is_followed() -> None:
    early = StructuredPruning(MACs(0.5), schedule=Window(Linear(), start=0.0, end=0.4), every_n_steps=2)
    net = module()
    trainer(early, QuantizationAwareTraining(Int8(), **{**STAGES, "start": 0.5})).fit(net)
    assert net.features.conv1.weight.shape[0] < 16
    with fake_quantized(net):
        assert net(IMAGES).isfinite().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start": 1.0}, "expected start <= freeze_observers <= freeze_batch_norm"),
        ({"start": -1}, "an epoch"),
        ({"freeze_observers": 1.5}, "a fraction of the run"),
        ({"start": 0.5, "freeze_observers": 0.4}, "expected start <= freeze_observers <= freeze_batch_norm"),
        ({"calibration_batches": 0}, "expected an integer >= 1"),
    ],
)
def test_bad_values_are_refused_at_once(options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        QuantizationAwareTraining(Int8(), **options)


def test_bad_recipes_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"`QuantizationAwareTraining\(recipe='int8'\)`: .*Write `recipe=Int8\(\)`"):
        QuantizationAwareTraining("int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one of 'qnnpack'"):
        Int8(engine="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 0 < momentum <= 1"):
        MovingAverage(0.0)


def test_what_cannot_work_in_this_run_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="counts epochs"):
        trainer(QuantizationAwareTraining(Int8(), start=1), max_epochs=-1, max_steps=4).fit(module())
    with pytest.raises(ValueError, match="before the end of the run"):
        trainer(QuantizationAwareTraining(Int8(), start=3)).fit(module())
    with pytest.raises(TargetError):
        trainer(QuantizationAwareTraining(Int8(exclude=["haed"]))).fit(module())
    two = [QuantizationAwareTraining(Int8(exclude="head")), QuantizationAwareTraining(IntN(exclude="features.*"))]
    with pytest.raises(ValueError, match=r"exclude='head'.*exclude='features.*found 2.*write one: .*MixedPrecision\("):
        trainer(*two).fit(module())


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="no kernels for x86")
def test_an_engine_that_does_not_fit_is_refused_before_training(tmp_path) -> None:
    def export() -> MobileExport:
        return MobileExport(tmp_path / "net.ptl", exporter=TorchScriptLite("x86"), latency_runs=1)

    for callbacks, sentence in (
        ([QuantizationAwareTraining(Int8(), **STAGES), export()], r"found \[-127, 127\], for 'qnnpack'"),
        ([export()], r"found no callback that does.*for a float file write `TorchScriptLite\(\)`"),
    ):
        net = module()
        with pytest.raises(UnsupportedError, match=sentence):
            trainer(*callbacks).fit(net)
        assert not net.losses
    for recipe in (Int8(engine="x86"), IntN(weights=4)):
        fits = export()
        trainer(QuantizationAwareTraining(recipe, **STAGES), fits).fit(module())
        assert fits.report is not None
        assert fits.report.details["engine"] == "x86"


@pytest.mark.parametrize("options", [{"calibration_batches": 99}, {"start": 0.99}], ids=str)
def test_a_run_that_is_too_short_warns_before_the_first_step(options) -> None:
    frozen = {"freeze_observers": 1.0, "freeze_batch_norm": 1.0}
    net = module()
    with pytest.raises(NoEffectWarning, match=r"about \d training batches remain after `start="):
        trainer(QuantizationAwareTraining(Int8(), **{**STAGES, **frozen, **options})).fit(net)  # warnings are errors
    assert not net.losses


@pytest.mark.slow
def test_two_ranks_have_one_network_and_resume(tmp_path) -> None:
    from tests.quantization.two_processes import run_both

    for found in run_both(tmp_path):
        assert found == {"apart": 0.0, "resumed": 0.0, "enabled": True, "example": [2, 3, 8, 8]}
