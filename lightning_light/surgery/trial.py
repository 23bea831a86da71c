"""Try replacements of layers in a forward pass of the whole model, before one of them is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.helper_networks import frozen_parts
from lightning_light.isolation import FORWARD_ERRORS, isolated, plain_attention
from lightning_light.nested import tensors_in
from lightning_light.training_step import TRAINING_STEP, callable_with, step_call

__all__ = ["failing_in_step", "failing_replacements", "temporarily_replaced"]

_TOLERANCE = 1e-3  # of the largest output, for layers that compute the same


@contextmanager
def temporarily_replaced(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of modules of ``model``, under all their names; afterwards all are back.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> with temporarily_replaced(model, {"0": nn.ReLU()}):
        ...     print(model[0])
        ReLU()
        >>> model[0]
        Linear(in_features=2, out_features=2, bias=True)
    """
    new = {model.get_submodule(name): module for name, module in replacements.items()}
    parents: Iterable[Any] = list(model.modules())
    before = [(parent._modules, dict(parent._modules)) for parent in parents]
    try:
        for children, _ in before:
            children.update({key: new[child] for key, child in children.items() if child in new})
        yield
    finally:
        for children, old in before:
            children.update(old)


def failing_replacements(
    model: nn.Module, replacements: Mapping[str, nn.Module], example: ExampleInput
) -> dict[str, str]:
    """Return the replacements with which ``model`` does not run, or computes something else, and why.

    All are tried at once; if that fails, one after the other, each beside those before it that work.

    Args:
        model: left as found, see `isolated`.
        replacements: name of a layer -> what computes the same as that layer.
        example: one call of the model.
    """
    if not replacements:
        return {}
    expected = _run(model, {}, example)
    if _difference(model, replacements, example, expected) is None:
        return {}
    return _one_by_one(model, replacements, example, expected)


def failing_in_step(
    module: nn.Module, replacements: Callable[[], Mapping[str, nn.Module]], batch: Any
) -> dict[str, str]:
    """Return the replacements with which the training step does not run, and why; none if no part is frozen.

    Code that averages a trained network into a frozen one, parameter by parameter, expects both to have equal shapes.

    Args:
        module: a LightningModule, left as found.
        replacements: returns name of a layer -> its replacement.
        batch: of training.
    """
    step = step_call(module, batch) if frozen_parts(module) else None
    if step is None or _difference(module, {}, step) is not None:  # nor does it run without them
        return {}
    tried = replacements()
    if _difference(module, tried, step) is None:
        return {}
    return {name: f"in the training step {reason}" for name, reason in _one_by_one(module, tried, step).items()}


def _one_by_one(
    model: nn.Module, replacements: Mapping[str, nn.Module], example: ExampleInput, expected: list[Tensor] | None = None
) -> dict[str, str]:
    working: dict[str, nn.Module] = {}
    failing: dict[str, str] = {}
    for name, new in replacements.items():
        reason = _difference(model, {**working, name: new}, example, expected)
        if reason is None:
            working[name] = new
        else:
            failing[name] = reason
    return failing


def _difference(
    model: nn.Module, replacements: Mapping[str, nn.Module], example: ExampleInput, expected: list[Tensor] | None = None
) -> str | None:
    """Return why the model does not run, or what it computes is not ``expected``."""
    try:
        found = _run(model, replacements, example)
    except FORWARD_ERRORS as error:
        first = next(iter(str(error).splitlines()), "")
        return f"the model does not run with a replacement of it ({type(error).__name__}: {first})"
    same = expected is None or (len(found) == len(expected) and all(map(_same, found, expected)))
    return None if same else "the model computes something else with a replacement that computes the same"


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return found.is_floating_point() == expected.is_floating_point()
    scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return bool(torch.isclose(found, expected, rtol=0.0, atol=_TOLERANCE * scale, equal_nan=True).all())


def _run(model: nn.Module, replacements: Mapping[str, nn.Module], example: ExampleInput) -> list[Tensor]:
    for name, new in replacements.items():
        new.train(example.method == TRAINING_STEP and model.get_submodule(name).training)
    with callable_with(model, example), isolated(model), plain_attention(), temporarily_replaced(model, replacements):
        return list(tensors_in(model(*example.args, **example.kwargs), objects=True))
