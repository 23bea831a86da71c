"""The stack of running modules: names, numbers of calls, errors, copies."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_light.module_stack import ModuleCall, ModuleStack


class Log(ModuleStack):
    """Notes when calls begin and end."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, str, int]] = []

    def entered(self, call: ModuleCall) -> None:
        self.events.append(("begin", call.name, call.number))

    def left(self, call: ModuleCall, output: Any) -> None:
        self.events.append(("end", call.name, call.number))


class Twice(nn.Module):
    """Calls its layer twice; a list hides another from ``named_modules``."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.layer, self.fails = nn.ReLU(), fails
        self.hidden = [nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden[0](self.layer(self.layer(x)))
        if self.fails:
            raise ValueError("fails")
        return x


LAYER = [("begin", "layer", 1), ("end", "layer", 1), ("begin", "layer", 2), ("end", "layer", 2)]
PASS = [("begin", "", 1), *LAYER, ("end", "", 1)]


def test_calls_are_counted_within_the_outermost_call() -> None:
    model, log = Twice(), Log()
    log.watch(model)
    model(torch.ones(1))
    model(torch.ones(1))
    assert log.events == PASS + PASS
    assert (log.current, log.outermost) == (None, None)
    log.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_call_that_fails_has_ended() -> None:
    model, log = Twice(fails=True), Log()
    log.watch(model)
    with pytest.raises(ValueError, match="fails"):
        model(torch.ones(1))
    assert log.events == PASS
    assert log.calls == []


def test_a_part_that_is_called_alone_is_the_outermost() -> None:
    model, log = Twice(), Log()
    log.watch(model)
    model.layer(torch.ones(1))
    assert log.events == [("begin", "layer", 1), ("end", "layer", 1)]


def test_a_step_that_ddp_calls_through_forward_is_no_call() -> None:
    class _ForwardRedirection:
        """Lightning's class, by its name: DDP calls a step through a patched ``forward``."""

        def __call__(self, module: nn.Module) -> None:
            def wrapped_forward(x: Tensor) -> Tensor:
                return module.layer(x)

            wrapped_forward.__qualname__ = "_ForwardRedirection.__call__.<locals>.wrapped_forward"
            module.forward = wrapped_forward

    model, log = Twice(), Log()
    log.watch(model)
    _ForwardRedirection()(model)
    model(torch.ones(1))
    assert log.events == [("begin", "layer", 1), ("end", "layer", 1)]


def test_copies_that_share_the_stack_enter_it() -> None:
    model, log = Twice(), Log()
    log.watch(model)
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    copied = copy.deepcopy(model, {id(hook.__self__): hook.__self__ for hook in hooks})
    copied(torch.ones(1))
    assert log.events == PASS
