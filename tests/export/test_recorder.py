"""The recorder keeps the inputs of ``forward``."""

import torch
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import Tensor, nn

from lightning_light.export.recorder import Recorder
from tests.zoo import noise


class Doubles(nn.Module):
    def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
        return x.mul_(scale)


def test_copies_are_taken_before_the_forward_writes() -> None:
    recorder, module = Recorder(limit=2), Doubles()
    recorder.start(module)
    with torch.inference_mode():
        for _ in range(3):
            module(noise(2, 3).clone(), scale=3.0)
    recorder.stop()
    assert [call.kwargs for call in recorder.calls] == [{"scale": 3.0}] * 2
    for call in recorder.calls:
        assert torch.equal(call.args[0], noise(2, 3))
        assert not call.args[0].is_inference()
    assert not module._forward_pre_hooks


def test_a_recording_without_calls_keeps_the_last_one() -> None:
    recorder, module = Recorder(limit=2), Doubles()
    recorder.start(module)
    module(noise(2, 3))
    recorder.stop()
    recorder.start(module)
    recorder.stop()
    recorder.stop()
    assert len(recorder.calls) == 1
    recorder.start(module)
    module(noise(4, 3))
    recorder.stop()
    assert [len(call.args[0]) for call in recorder.calls] == [4]


def test_a_step_that_ddp_calls_through_forward_is_not_recorded() -> None:
    class Steps(Doubles):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self(batch[0])

    recorder, module = Recorder(limit=2), Steps()
    recorder.start(module)
    _ForwardRedirection()(module, module, "validation_step", [noise(2, 3)], 0)  # type: ignore[arg-type]
    recorder.stop()
    assert [len(call.args) for call in recorder.calls] == [1]
