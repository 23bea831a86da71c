"""A model that runs in isolation is left as it was."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.compile import from_compiled
from torch import Tensor, nn

from lightning_light.host.patches import patches_of, wrap_method
from lightning_light.isolation import isolated, uncompile, uncompiled
from lightning_light.measure.cost import count_cost


class Restless(nn.Module):
    """Changes buffers, attributes, containers and every random generator when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("calls", torch.zeros(()))
        self.last: float | None = None
        self.cache: dict[str, Tensor] = {}
        self.seen = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache["input"] = x
        self.seen.append(1)
        self.last = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return self.norm(x)


def states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()]


@pytest.mark.parametrize("hooks", [False, True])
def test_nothing_is_left_behind(hooks: bool) -> None:
    model, calls = Restless().train(), []

    def observe(*_: Any) -> None:
        calls.append(torch.is_grad_enabled())

    model.norm.register_forward_hook(observe)
    before, tensors = states(), {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cpu"), isolated(model, hooks=hooks):
        assert model(torch.randn(4, 2)).dtype == torch.float32
        assert not model.training
        assert float(model.calls) == 1
        model.norm.register_forward_hook(lambda *_: None).remove()
        model.register_forward_hook(lambda *_: None)  # as modules that record their own outputs do when they run
    assert calls == [False] * hooks
    assert states() == before
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model.norm.training
    assert model.last is None
    assert (model.cache, model.seen) == ({}, [0])
    assert (len(model.norm._forward_hooks), len(model._forward_hooks)) == (1, 0)


def test_inference_mode_is_off_inside() -> None:
    model = nn.Linear(2, 2)
    with torch.inference_mode(), isolated(model):
        assert not model(torch.ones(1, 2)).is_inference()


class Logits(nn.Module):
    """A callable object as a hook: what it returns is not known."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output["logits"]


def test_hooks_that_the_output_depends_on_run() -> None:
    """Without them the model would compute something else: the hook of a wrapped segmentation network, for instance."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": x}

    seen: list[Any] = []

    def observe(module: nn.Module, args: Any, output: Any) -> None:
        if output is not None:
            seen.append(output)
            return

    def double(module: nn.Module, args: Any) -> Any:
        return (args[0] * 2,) if args else None

    model = nn.Sequential(Inner(), nn.Identity())
    model[0].register_forward_hook(Logits())
    model[1].register_forward_pre_hook(double)
    model[1].register_forward_hook(observe)
    model.register_forward_hook(lambda module, args, output: output + 1)
    with isolated(model):
        assert model(torch.ones(1)).item() == 3.0
    assert seen == []


def test_hooks_of_transformers_collect_what_its_models_return() -> None:
    class Collecting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen.clear()
            super().forward(x)
            return seen[0] + seen[1]

    seen: list[Tensor] = []

    def collect(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output)

    collect.__module__ = "transformers.utils.output_capturing"
    model = Collecting(nn.Linear(4, 3), nn.Linear(3, 3))
    for layer in model:
        layer.register_forward_hook(collect)
    assert count_cost(model, (torch.zeros(1, 4),)).macs == 3 * 4 + 3 * 3


class Two(pl.LightningModule):
    """Returns its input, plus what is wrapped around it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x: int) -> int:
        return x

    def training_step(self, x: int) -> int:
        return self(x)


class Double(nn.Module):
    """A module that is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def compiled(kind: str) -> tuple[nn.Module, list[str]]:
    """Return a module, and what it appends to when compiled code of it is about to run."""
    runs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        runs.append(kind)
        return graph.forward

    model: nn.Module = nn.Sequential(Double())
    if kind == "in_place":
        model[0].compile(backend=backend)  # type: ignore[operator]
    elif kind == "child":
        model = nn.Sequential(torch.compile(Double(), backend=backend))  # type: ignore[arg-type]
    return model, runs


@pytest.mark.parametrize("kind", ["in_place", "child"])
def test_compiled_modules_run_as_written(kind: str) -> None:
    model, runs = compiled(kind)
    with uncompiled(model):
        model(torch.ones(1))
        assert runs == []
    assert not any(patches_of(module) for module in model.modules())
    model(torch.ones(1))
    assert runs == [kind]


def test_a_lightning_module_that_a_trainer_gets_compiled_runs_as_written_beneath_our_wrappers() -> None:
    module = Two()
    written = module.training_step
    from_compiled(torch.compile(module, backend="eager"))  # type: ignore[arg-type]
    compiled_step = module.training_step
    wrapped = wrap_method(module, "training_step", lambda original, x: original(x) + 1)
    patches = uncompile(module)
    assert wrapped.original == written
    assert module.training_step(1) == 2
    for patch in patches:
        patch.undo()
    assert wrapped.original is compiled_step
    wrapped.undo()
    assert module.training_step is compiled_step
    assert patches_of(module) == []


@pytest.mark.filterwarnings("ignore:.torch.jit.(script|freeze). is deprecated")
def test_scripted_parts_are_in_evaluation_mode_too() -> None:
    script = torch.jit.script(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    dropout, norm = script.children()
    frozen = torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval()))  # which has no training mode
    model, x = nn.Sequential(script, frozen), torch.randn(4, 2)
    script.train()
    norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with isolated(model):
        assert torch.equal(model(x), model(x))
        assert not any(part.training for part in (script, dropout, norm))
    assert [part.training for part in (script, dropout, norm)] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
