"""A network that was quantized without training is a start for training."""

from typing import Any

import pytest
import torch

from lightning_light.quantization import LSQ, AdaRound, Int8, IntN, QuantizationAwareTraining, quantize
from lightning_light.surgery.attachment import state_of
from tests.contract.runs import trainer
from tests.quantization.test_quantization_aware_training import IMAGES, Diary, module


@pytest.mark.parametrize("recipe", [IntN(weights=4), LSQ(weights=4, activations=8)], ids=["IntN", "LSQ"])
def test_training_goes_on_from_its_ranges(recipe) -> None:
    net = module()
    quantize(net, IMAGES, recipe, rounding=AdaRound(steps=5), correct_bias=True)
    found = state_of(net).state["quantization_aware_training"]
    ranges, steps = found["ranges"].clone(), {name: value.clone() for name, value in found["learned"].items()}
    weight = net.features.conv1.weight.detach().clone()
    qat = QuantizationAwareTraining(recipe, start=0.0, freeze_observers=0.0)
    diary = Diary(qat)
    trainer(qat, diary).fit(net)
    assert set(diary.enabled) == {True}, "from the first batch on: nothing is observed first"
    assert all(torch.equal(ranges, seen) for seen in diary.ranges)
    assert not torch.equal(weight, net.features.conv1.weight), "it learns"
    state = qat.state(net)
    moved = [name for name, value in steps.items() if not torch.equal(value, state["learned"][name])]
    assert bool(moved) == isinstance(recipe, LSQ), "scales begin where rounding was learned, and learn"


@pytest.mark.parametrize(
    ("recipe", "options"), [(Int8(), {"start": 0.0}), (IntN(), {"start": 0.25})], ids=["another recipe", "later"]
)
def test_otherwise_it_observes_again(recipe, options) -> None:
    net = module()
    quantize(net, IMAGES, IntN())
    qat = QuantizationAwareTraining(recipe, calibration_batches=2, **options)
    diary: Any = Diary(qat)
    trainer(qat, diary).fit(net)
    assert [one for one in diary.enabled if one is not None][:3] == [False, False, True]


def test_a_second_fit_starts_over() -> None:
    net = module()
    quantize(net, IMAGES, IntN())
    for enabled in ([True] * 3, [None, False, False]):
        qat = QuantizationAwareTraining(IntN(), start=0.0, calibration_batches=2)
        diary: Any = Diary(qat)
        trainer(qat, diary).fit(net)
        assert diary.enabled[:3] == enabled
