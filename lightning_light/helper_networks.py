"""Find frozen networks that a module only trains with: a teacher of the user, a perceptual loss, momentum encoders."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated
from lightning_light.module_stack import ModuleCall, ModuleStack
from lightning_light.nested import tensors_in
from lightning_light.targets import inside
from lightning_light.training_step import callable_with, step_call

__all__ = ["first_call", "frozen_parts", "helper_networks", "inside"]


def first_call(module: nn.Module, batch: Any = None) -> ExampleInput | None:
    """Return a call that shows which networks ``module`` uses: of ``forward`` if its input is known, else of the step.

    Args:
        module: a LightningModule.
        batch: of training; without it a step is not known.
    """
    array = getattr(module, "example_input_array", None)
    if array is not None:
        return ExampleInput.of(array)
    return None if batch is None else step_call(module, batch)


def frozen_parts(model: nn.Module) -> list[str]:
    """Name the outermost modules all of whose parameters are frozen, or averages; none if nothing is trained.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2).requires_grad_(False)))
        >>> frozen_parts(model)
        ['1']
    """
    found: list[str] = []
    if any(parameter.requires_grad for parameter in model.parameters()):
        for name, module in model.named_modules():
            parameters = list(module.parameters())
            trained = any(p.requires_grad or is_lazy(p) for p in parameters) and not isinstance(module, AveragedModel)
            frozen = bool(name and parameters) and not trained
            if frozen and not inside(name, found):
                found.append(name)
    return found


def helper_networks(model: nn.Module, example: ExampleInput | None) -> list[str]:
    """Name the frozen parts of ``model`` that are not part of the network that is trained.

    In a call of ``forward``, of the model or within a step, those are the parts that it does not call. In a step that
    does not call ``forward``, they are those whose output no operation combines with a trained parameter.

    Args:
        model: left as found, see `isolated`; it runs only if it has frozen parts.
        example: one call, or one training step, of it. Without one no part is known to be a helper.
    """
    parts = frozen_parts(model) if example is not None else []
    if not parts or example is None:
        return []
    watch, moved = _Watch(parts), example.to(model)
    with callable_with(model, moved), isolated(model), watch, watch.stack.watching(model):
        model(*moved.args, **moved.kwargs)
    return [part for part in parts if part not in watch.used]


class _Watch(TorchFunctionMode):
    """Record which parts are used in the network, and follow their outputs to trained parameters."""

    def __init__(self, parts: list[str]) -> None:
        super().__init__()
        self.reached: set[str] = set()
        self.called: set[str] = set()
        self.stack = _Stack(self, parts)
        self.sources: Any = WeakIdKeyDictionary()  # tensor -> the parts whose outputs it depends on

    @property
    def used(self) -> set[str]:
        """Parts of the network."""
        return self.called if self.stack.forward else self.reached

    @override
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        sources = frozenset().union(*(self.sources.get(tensor, ()) for tensor in inputs))
        if sources:
            if any(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in inputs):
                self.reached |= sources
            self.mark(result, sources)
        return result

    def mark(self, value: Any, sources: frozenset[str]) -> None:
        for tensor in tensors_in(value, objects=True):
            self.sources[tensor] = frozenset(self.sources.get(tensor, ())) | sources


class _Stack(ModuleStack):
    def __init__(self, watch: _Watch, parts: list[str]) -> None:
        super().__init__()
        self._watch, self._parts = watch, parts
        self.forward = False

    @override
    def entered(self, call: ModuleCall) -> None:
        self.forward |= not call.name
        if call.name in self._parts and any(one is not None and not one.name for one in self.calls):
            self._watch.called.add(call.name)

    @override
    def left(self, call: ModuleCall, output: Any) -> None:
        if call.name in self._parts:
            self._watch.mark(output, frozenset([call.name]))
