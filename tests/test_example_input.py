"""What the network is called with, caught without drawing a batch."""

from collections import namedtuple
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_light.capture import capture
from lightning_light.example_input import ExampleInput
from lightning_light.nested import tensors_in
from tests.surgery.runs import HOSTS, MODULES, Lit, Loader, trainer
from tests.zoo import noise

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers", "ignore:.*LeafSpec:FutureWarning"
)
Pair = namedtuple("Pair", ["left", "right"])


class Catches(pl.Callback):
    """Captures from the start of training, and counts the batches it took."""

    def __init__(self, part: str | None = None) -> None:
        self.part, self.seen = part, []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.found = capture(pl_module, pl_module.get_submodule(self.part) if self.part else None)

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.found.example is not None)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("part", [None, "net", "net.conv2"])
def test_the_first_training_batch_is_caught(host, part) -> None:
    catches = type("Catches", (Catches, host.Callback), {})(part)
    module = MODULES[host]()
    state = torch.random.get_rng_state()
    trainer(catches, host=host, max_epochs=1, num_sanity_val_steps=1).fit(module, Loader())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert catches.seen == [True] * 4
    (example,) = catches.found.example.args
    assert example.shape == ((2, 8, 8, 8) if part == "net.conv2" else (2, 3, 8, 8))
    if part != "net.conv2":
        assert torch.equal(example, Loader().batches[0][0][:2])  # of training, not of the sanity check
    assert not example.requires_grad
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_an_example_input_array_is_taken_at_once() -> None:
    module = Lit()
    module.example_input_array = noise(5, 3, 8, 8)
    found = capture(module)
    assert found.example is not None
    assert found.example.args[0].shape == (2, 3, 8, 8)
    assert not module._forward_pre_hooks
    module.example_input_array = {"x": noise(1, 3, 8, 8)}
    assert list(capture(module).example.kwargs) == ["x"]
    module.example_input_array = (noise(1, 3, 8, 8),)
    assert len(capture(module).example.args) == 1
    part = capture(module, module.net)
    assert part.example is None
    part.remove()
    part.remove()
    assert not module.net._forward_pre_hooks


def test_evaluation_without_a_trainer_is_not_looked_at() -> None:
    net = nn.Linear(3, 1)
    found = capture(net)
    net.eval()(noise(4, 3))
    assert found.example is None
    net.train()(noise(4, 3))
    assert found.example is not None


@pytest.mark.parametrize(
    ("value", "args", "kwargs"),
    [
        (3, (3,), {}),
        ([1, 2], ([1, 2],), {}),
        ((1, 2), (1, 2), {}),
        ({"x": 1}, (), {"x": 1}),
        (ExampleInput((1,), {"y": 2}), (1,), {"y": 2}),
    ],
)
def test_example_inputs_are_read_as_an_example_input_array(value: Any, args: Any, kwargs: Any) -> None:
    found = ExampleInput.of(value)
    assert (found.args, found.kwargs) == (args, kwargs)


def test_no_example_input_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a tensor, a tuple of positional arguments, a dict"):
        ExampleInput.of(None)


def test_any_structure_of_arguments() -> None:
    args = ({"a": noise(4, 3), "b": [noise(4), "text", None]}, Pair(noise(4, 2), 1.5))
    small = ExampleInput(args, {"mask": torch.ones(4, dtype=torch.bool)}).small()
    assert [tuple(tensor.shape) for tensor in tensors_in((small.args, small.kwargs))] == [(2, 3), (2,), (2, 2), (2,)]
    assert small.args[0]["b"][1:] == ["text", None]
    assert isinstance(small.args[1], Pair)
    moved = small.to(nn.Linear(1, 1).double())
    assert [t.dtype for t in tensors_in((moved.args, moved.kwargs))] == [torch.float64] * 3 + [torch.bool]


@pytest.mark.parametrize("others", [(noise(2, 4, 5),), (torch.tensor(3.0),)])
def test_where_tensors_do_not_agree_on_samples_all_are_kept(others: tuple[Tensor, ...]) -> None:
    small = ExampleInput((noise(4, 3), *others)).small()
    assert small.args[0].shape == (4, 3)
    assert small.args[1].shape == others[0].shape
