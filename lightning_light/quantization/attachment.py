"""Fake quantization in place: hooks on the user's modules, and nothing else of theirs is touched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_light.qdq import RoundsNumbers
from lightning_light.quantization.operations import BATCH_NORM, HEAVY, kind_of, name_of
from lightning_light.quantization.places import Frames
from lightning_light.quantization.plan import Plan
from lightning_light.quantization.qdq_pairs import activation_pair, weight_pair
from lightning_light.quantization.rounding import round_activation, round_weight, scales_of, weight_scale

__all__ = ["Attachment", "attach"]

Form = Literal["plain", "rounded", "pairs"]


class Attachment(Frames, RoundsNumbers):
    """Carries out a plan on one network, as long as it is attached.

    Attributes:
        plan: what is rounded.
        highest: the largest quantized activation.
        form: ``plain`` numbers, ``rounded`` ones, or ``pairs`` of operations to be traced.
        observing: whether ranges of the numbers are noted, for `observed`.
        batch_norm_frozen: whether folded batch norms use, and keep, the statistics that they have.
    """

    def __init__(self, plan: Plan, highest: int) -> None:
        super().__init__()
        self.plan = plan
        self.highest = highest
        self.form: Form = "plain"
        self.observing = False
        self.batch_norm_frozen = False
        self.scales: list[tuple[float, int] | None] = []
        self.weight_scales: dict[str, Tensor] = {}
        self._seen: dict[int, Tensor] = {}
        self._folded = frozenset(plan.batch_norms)
        self._open: list[Any] = []

    def use(self, ranges: Tensor) -> None:
        """Compute every grid anew."""
        self.scales = scales_of(self.plan.grids, ranges, self.highest)

    def observed(self, device: torch.device) -> Tensor:
        """``(grids, 2)``: smallest and largest value of each since the last call; infinite where there was none."""
        nothing = torch.tensor([torch.inf, -torch.inf], device=device)
        ranges = [self._seen[place].to(device) if place in self._seen else nothing for place in self._places]
        self._seen = {}
        return torch.stack(ranges) if ranges else torch.empty(0, 2, device=device)

    @property
    def _places(self) -> range:
        return range(len(self.plan.grids))

    @override
    def begin(self) -> None:
        self._open = [_Mode(self)]
        if "torch._dynamo" in sys.modules:  # compiled code would not see the mode
            self._open.append(torch.compiler.set_stance("force_eager"))
        for context in self._open:
            context.__enter__()

    @override
    def end(self) -> None:
        while self._open:
            self._open.pop().__exit__(None, None, None)

    @override
    @contextmanager
    def writing_qdq(self, call: Callable[[], Any]) -> Iterator[None]:
        form, self.weight_scales = self.form, {}
        if form == "plain":
            yield
            return
        try:
            with torch.no_grad():
                call()  # notes the scales of all weights
            self.form = "pairs"
            yield
        finally:
            self.form, self.weight_scales = form, {}

    # What the mode asks at every operation.

    def before(self, key: str, kind: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Round a weight, and inputs of the network; tell a batch norm which statistics to use."""
        if kind == BATCH_NORM and self.batch_norm_frozen and key in self._folded:
            _set(args, kwargs, 5, "training", False)
        if self.form != "plain" and kind in HEAVY and key in self.plan.weights:
            _set(args, kwargs, 1, "weight", self._weight(key, _get(args, kwargs, 1, "weight")))
        for place, grid in self.plan.arguments.get(key, {}).items():
            name = None if place < len(args) else list(kwargs)[place - len(args)]
            value = args[place] if name is None else kwargs[name]
            rounded = self.activation(grid, value)
            if name is None:
                args[place] = rounded
            else:
                kwargs[name] = rounded

    def activation(self, grid: int, x: Any) -> Any:
        """``x`` on its grid; what is no floating point tensor stays itself."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if self.observing:
            self._note(grid, x)
        found = self.scales[grid]
        if self.form == "plain" or found is None:
            return x
        scale, zero = found
        return (activation_pair if self.form == "pairs" else round_activation)(x, scale, zero, self.highest)

    def _weight(self, key: str, w: Tensor) -> Tensor:
        per_channel = self.plan.weights[key]
        if self.form == "pairs":
            return weight_pair(w, self.weight_scales[key], per_channel)
        if not torch.is_grad_enabled():
            self.weight_scales[key] = weight_scale(w, per_channel)
        return round_weight(w, per_channel)

    def _note(self, grid: int, x: Tensor) -> None:
        low, high = torch.aminmax(x.detach())
        found = torch.stack([low, high]).float()
        if grid in self._seen:
            before = self._seen[grid]
            found = torch.stack([torch.minimum(before[0], found[0]), torch.maximum(before[1], found[1])])
        self._seen[grid] = found


class _Mode(TorchFunctionMode):
    """Sees every operation of a forward pass as it is called."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__()
        self.attachment = attachment

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = name_of(func)
        key = self.attachment.next_key(name)
        if key is None:
            return func(*args, **kwargs)
        given = list(args)
        self.attachment.before(key, kind_of(name), given, kwargs)
        result = func(*given, **kwargs)
        grid = self.attachment.plan.outputs.get(key)
        return result if grid is None else self.attachment.activation(grid, result)


def _get(args: list[Any], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs[name]


def _set(args: list[Any], kwargs: dict[str, Any], place: int, name: str, value: Any) -> None:
    if len(args) > place:
        args[place] = value
    else:
        kwargs[name] = value


def attach(model: nn.Module, plan: Plan, ranges: Tensor, highest: int) -> Attachment:
    """Hook ``model``, and begin with plain numbers."""
    attachment = Attachment(plan, highest)
    attachment.use(ranges)
    attachment.watch(model)
    return attachment
