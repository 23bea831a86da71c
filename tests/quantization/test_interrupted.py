"""A run that ends by an error, and training that does not go where the example went, or goes there twice."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_light.quantization import LSQ, Int8, QuantizationAwareTraining, fake_quantized
from tests.contract.bodies import Body, module_class
from tests.contract.runs import differences, trainer

STAGES: dict[str, Any] = {"start": 0.0, "calibration_batches": 2}
IMAGES = Body.train_dataloader(None).batches[0][0]  # type: ignore[arg-type]


class Breaks(Body):
    """In the sixth step, when fake quantization is on, and only once."""

    broken = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.broken and len(self.losses) == 5:
            self.broken = True
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)


def hooks(net: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())


def test_after_an_error_the_module_computes_in_float_and_can_be_fitted_again() -> None:
    net, qat = module_class(Breaks, pl)(), QuantizationAwareTraining(Int8(), **STAGES)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(qat).fit(net)
    assert not hooks(net)
    net.eval()
    with torch.no_grad():
        plain = net(IMAGES)
        with fake_quantized(net):
            assert not torch.equal(net(IMAGES), plain)
    trainer(qat).fit(net.train())
    assert qat.state(net)["enabled"]
    assert qat.state(net)["batches"] > 2
    assert not hooks(net)


class Elsewhere(Body):
    """``training_step`` writes out what ``forward`` does: the operations of its own have other names."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        f = self.features
        x = F.relu(f.bn0(f.stem(images)))
        x = F.relu(x + f.bn2(f.conv2(F.relu(f.bn1(f.conv1(x))))))
        return F.cross_entropy(self.head(F.relu(f.last(x)).mean((2, 3))), labels)


def test_a_module_that_is_compiled_as_a_whole_is_trained_as_written() -> None:
    ends = []
    for way in (lambda net: net, lambda net: torch.compile(net, backend="eager")):
        net = module_class(Body, pl)()
        net.example_input_array = IMAGES
        qat = QuantizationAwareTraining(Int8(), **STAGES)
        trainer(qat).fit(way(net))
        assert qat.state(net)["enabled"]
        ends.append(net.state_dict())
    assert not differences(*ends)
    assert all(hasattr(vars(net)[name], "_torchdynamo_orig_callable") for name in ("forward", "training_step"))


def test_places_that_training_never_comes_by_are_named() -> None:
    net = module_class(Elsewhere, pl)()
    net.example_input_array = IMAGES
    with pytest.warns(
        UserWarning,
        match=r"found none at \[.*'features'.*\] in the calibration .*Does `training_step` call `self\(",
    ) as warned:
        trainer(QuantizationAwareTraining(Int8(), **STAGES), limit_val_batches=0).fit(net)
    assert sum("found none at" in str(one.message) for one in warned) == 1


class Again(Body):
    """The features are computed again in the backward pass, instead of being kept."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.features, x, use_reentrant=False))


@pytest.mark.parametrize("recipe", [Int8(), LSQ()], ids=str)
def test_what_is_computed_again_in_the_backward_pass_is_rounded_again(recipe) -> None:
    nets = [module_class(body, pl)() for body in (Body, Again)]
    for net in nets:
        for norm in (net.features.bn0, net.features.bn1, net.features.bn2):
            norm.momentum = 0.0  # else its statistics see every batch twice
        trainer(QuantizationAwareTraining(recipe, **STAGES), max_epochs=1).fit(net)
    first, second = (dict(net.named_parameters()) for net in nets)
    assert not differences(first, second)
