"""Fake quantization in place: hooks on the user's modules, and nothing else of theirs is touched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_light.int8 import Int8Form, PairRules, RoundsNumbers
from lightning_light.quantization.learning import learned_activation
from lightning_light.quantization.lowering.forms import in_pairs, on_kernels
from lightning_light.quantization.lowering.lowered import Lowered
from lightning_light.quantization.news import warnings_of_the_caller
from lightning_light.quantization.operations import BATCH_NORM, HEAVY, kind_of, name_of, set_argument
from lightning_light.quantization.parameters import first_step, learned_scale, names_of
from lightning_light.quantization.places import Frames
from lightning_light.quantization.plan import Plan
from lightning_light.quantization.rounding import (
    round_activation,
    round_at_run_time,
    round_weight,
    scales_of,
)
from lightning_light.quantization.rules import WeightRule

__all__ = ["Attachment", "attach"]

Form = Literal["plain", "rounded"]


class Attachment(Frames, RoundsNumbers):
    """Carries out a plan on one network, as long as it is attached.

    Attributes:
        plan: what is rounded.
        engine: whose kernels will run it.
        learned: what is learned of the grids, as `learned_scale` names it.
        form: ``plain`` numbers, or ``rounded`` ones.
        lowered: computes instead, while the network is exported.
        observing: whether ranges of the numbers are noted, for `observed`.
        batch_norm_frozen: whether folded batch norms use, and keep, the statistics that they have.
        at_least: bits that no grid has fewer of, for now.
        ranges: that were observed.
        grids: the plan's, with no fewer bits than that.
        scales: scale and zero point of each grid; None where nothing was seen, and where ranges are found at run time.
        first_steps: of the weights whose step sizes will be learned, as they were when last observed.
    """

    def __init__(self, plan: Plan, engine: str, learned: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.plan, self.engine = plan, engine
        self.learned: Mapping[str, Tensor] = learned or {}
        self.form: Form = "plain"
        self.observing = False
        self.batch_norm_frozen = False
        self.lowered: Lowered | None = None
        self.at_least = 0
        self.ranges = torch.empty(0, 2)
        self.grids = list(plan.grids)
        self.scales: list[tuple[float, int] | None] = []
        self.first_steps: dict[str, Tensor] = {}
        self._weights = dict(plan.weights)
        self._values: dict[str, Tensor] = {}  # of what is learned, in the same memory
        self._seen: dict[int, Tensor] = {}
        self._folded = frozenset(group.batch_norm for group in plan.groups.values())
        self._open: list[Any] = []
        self._compiled: list[tuple[nn.Module, str, Any]] = []

    @override
    def watch(self, model: nn.Module) -> None:
        """Modules that are compiled in place run as written until `let_go`: a hook cannot be compiled along."""
        super().watch(model)
        for module in model.modules():
            if (compiled := getattr(module, "_compiled_call_impl", None)) is not None:
                self._compiled.append((module, "_compiled_call_impl", compiled))
                module._compiled_call_impl = None
            for name, written in _compiled_by_lightning(module):
                self._compiled.append((module, name, vars(module)[name]))
                setattr(module, name, written)

    @override
    def let_go(self) -> None:
        super().let_go()
        while self._compiled:
            module, name, compiled = self._compiled.pop()
            setattr(module, name, compiled)

    def use(self, ranges: Tensor, at_least: int = 0) -> None:
        """Compute every grid anew: from ``ranges`` and what is learned, with no fewer than ``at_least`` bits."""
        if at_least != self.at_least:
            self._weights = {key: rule.at(at_least) for key, rule in self.plan.weights.items()}
            self.grids = [grid.at(at_least) for grid in self.plan.grids]
        self._values = {name: value.detach() for name, value in self.learned.items()}
        self.ranges, self.at_least, self.scales = ranges, at_least, scales_of(self.grids, ranges)
        for place, grid in enumerate(self.grids):
            if grid.learned and self.learned:
                self.scales[place] = learned_scale(self.learned, place, grid) or self.scales[place]

    def highs(self) -> dict[str, int]:
        """The largest whole number of every step size that is learned, now."""
        weights = {key: rule.high for key, rule in self._weights.items() if rule.learned}
        steps = [(f"grid {place} step", grid.high) for place, grid in enumerate(self.grids) if "step" in grid.learned]
        return weights | dict(steps)

    @property
    def shares(self) -> Tensor:
        """``(grids,)``: the weight of a new batch in the average of each grid's range; nan for the widest of all."""
        return torch.tensor([torch.nan if (share := grid.observer.share) is None else share for grid in self.grids])

    def weight(self, key: str) -> tuple[WeightRule, Tensor | None]:
        """How the weight of an operation is rounded: the rule, and its scale if that is learned."""
        values = self.learned if torch.is_grad_enabled() else self._values  # a tracer takes no parameters of ours
        return self._weights[key], values.get(key)

    def observed(self, device: torch.device) -> Tensor:
        """``(grids, 2)``: smallest and largest value of each since the last call; infinite where there was none."""
        nothing = torch.tensor([torch.inf, -torch.inf], device=device)
        ranges = [self._seen.get(place, nothing).to(device) for place in range(len(self.plan.grids))]
        self._seen = {}
        return torch.stack(ranges) if ranges else torch.empty(0, 2, device=device)

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
    def finish(self, output: Any) -> Any:
        return None if self.lowered is None or self.lowered.collecting else self.lowered.finish(output)

    # What an exporter asks.

    @property
    @override
    def is_rounding(self) -> bool:
        return self.form == "rounded"

    @override
    def on_kernels(self, call: Callable[[], Any], engine: str) -> AbstractContextManager[Int8Form]:
        return on_kernels(self, call, engine)

    @override
    def in_pairs(self, call: Callable[[], Any], rules: PairRules) -> AbstractContextManager[Int8Form]:
        return in_pairs(self, call, rules)

    # What the mode asks at every operation.

    def run(self, key: str, name: str, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """One operation: rounded, or as a runtime computes it."""
        if self.lowered is not None and not self.lowered.collecting:
            return self.lowered.run(key, name, function, args, kwargs)
        if self.lowered is not None:
            self.lowered.collect(key, name, args, kwargs)
        self.before(key, kind_of(name), args, kwargs)
        result = function(*args, **kwargs)
        grid = self.plan.outputs.get(key)
        return result if grid is None else self._activation(grid, result)

    def before(self, key: str, kind: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Round a weight, and inputs of the network; log_rank_zero a batch norm which statistics to use."""
        for place, grid in self.plan.arguments.get(key, {}).items():
            if place < len(args):
                args[place] = self._activation(grid, args[place])
            else:
                name = list(kwargs)[place - len(args)]
                kwargs[name] = self._activation(grid, kwargs[name])
        if kind == BATCH_NORM and self.batch_norm_frozen and key in self._folded:
            set_argument(args, kwargs, 5, "training", False)
        if kind in HEAVY and key in self.plan.weights:
            self._round_weight(key, args, kwargs)

    def _round_weight(self, key: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        rule, step = self.weight(key)
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if self.form != "plain":
            set_argument(args, kwargs, 1, "weight", round_weight(weight, rule, step))
        elif self.observing and rule.learned:
            self.first_steps[key] = first_step(weight, rule.high, rule.per_channel)

    def _activation(self, place: int, x: Any) -> Any:
        """``x`` on its grid; what is no floating point tensor stays itself."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if self.observing:
            self._note(place, x)
        return x if self.form == "plain" else self.rounded(place, x)

    def rounded(self, place: int, x: Tensor) -> Tensor:
        """``x`` on the grid at ``place``; itself if nothing is known of that."""
        grid, scale = self.grids[place], self.scales[place]
        if grid.at_run_time:
            return round_at_run_time(x, grid)
        if grid.learned and torch.is_grad_enabled() and (names := names_of(place, grid))[0] in self.learned:
            return learned_activation(x, grid, *(self.learned[name] for name in names))
        return x if scale is None else round_activation(x, *scale, grid.high)

    def _note(self, place: int, x: Tensor) -> None:
        grid = self.grids[place]
        if grid.at_run_time or not x.numel() or (grid.learned and self.form == "rounded"):
            return
        found = grid.observer.extremes(x.detach().float(), grid.high, grid.positive)
        if grid.positive:
            found = found.clamp_min(0.0)
        if place in self._seen:
            before = self._seen[place]
            found = torch.stack([torch.minimum(before[0], found[0]), torch.maximum(before[1], found[1])])
        self._seen[place] = found


def _compiled_by_lightning(module: nn.Module) -> list[tuple[str, Any]]:
    """Of ``torch.compile(module)`` that a Trainer was given: the name of each method, and what it was before."""
    context = vars(module).get("_compiler_ctx") or {}
    methods = ((key.removeprefix("original_"), value) for key, value in context.items() if key.startswith("original_"))
    return [(name, value) for name, value in methods if name in vars(module)]


class _Mode(TorchFunctionMode):
    """Sees every operation of a forward pass as it is called."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__()
        self.attachment = attachment

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = name_of(func)
        key = self.attachment.next_key(name)
        if key is None:
            return func(*args, **(kwargs or {}))
        if torch._C._get_tracing_state() is not None:
            with warnings_of_the_caller():
                return self.attachment.run(key, name, func, list(args), dict(kwargs or {}))
        return self.attachment.run(key, name, func, list(args), dict(kwargs or {}))


def attach(
    model: nn.Module,
    plan: Plan,
    ranges: Tensor,
    engine: str,
    learned: Mapping[str, Tensor] | None = None,
    at_least: int = 0,
) -> Attachment:
    """Hook ``model``, and begin with plain numbers."""
    attachment = Attachment(plan, engine, learned)
    attachment.use(ranges, at_least)
    attachment.watch(model)
    return attachment
