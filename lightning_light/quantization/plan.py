"""Where numbers are rounded: decided once for the whole network, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_light.quantization.operations import ADDING, BATCH_NORM, HEAVY
from lightning_light.quantization.places import module_of
from lightning_light.quantization.record import Operation
from lightning_light.quantization.rules import Grid, LayerRule, WeightRule

__all__ = ["Group", "Plan", "plan_sites"]

_OWN = "own"  # a layer without an int8 kernel: what it reads is rounded for it alone, what it writes is float


@dataclass(frozen=True)
class Group:
    """What one kernel computes, after its own operation.

    Attributes:
        tail: the last operation of the group.
        batch_norm: one that is folded into the weight.
        relu: a ReLU, or ReLU6.
    """

    tail: str
    batch_norm: str | None = None
    relu: str | None = None


@dataclass(frozen=True)
class Plan:
    """The sites of one network, in plain types.

    Attributes:
        grids: what the sites below number.
        outputs: operation -> grid that its result is rounded to.
        arguments: operation -> position of an argument -> grid; for inputs of the network, for what an operation
            gives in a tuple, and for layers without a kernel.
        reads: operation with a weight -> grid of the numbers that it reads.
        means: average pools whose result stays on the grid of what they read.
        weights: operation -> how its weight is rounded.
        groups: operation -> what its kernel computes along with it.
        without_kernel: operations whose weight is rounded and that no int8 kernel computes, with the reason.
        left_float: layers whose weights stay float, with the reason.
    """

    grids: list[Grid] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)
    arguments: dict[str, dict[int, int]] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    means: list[str] = field(default_factory=list)
    weights: dict[str, WeightRule] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    without_kernel: dict[str, str] = field(default_factory=dict)
    left_float: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**asdict(self), "grids": [grid.plain() for grid in self.grids]}

    def sites_of(self, grids: Iterable[int]) -> list[str]:
        """The modules whose numbers are on one of ``grids``."""
        wanted = set(grids)
        sites = [(key, grid) for key, places in self.arguments.items() for grid in places.values()]
        return [module_of(key) for key, grid in [*sites, *self.outputs.items()] if grid in wanted]

    def bits_of_layers(self, at_least: int = 0) -> dict[str, dict[str, float]]:
        """Layer -> bits of its weight, and of the numbers that it reads if those are rounded: for monitors.

        Args:
            at_least: the rung of a ladder.
        """
        found: dict[str, dict[str, float]] = {}
        for key, rule in self.weights.items():
            bits = {"weight_bits": float(rule.at(at_least).bits)}
            read = [self.reads[key]] if key in self.reads else list(self.arguments.get(key, {}).values())
            if read:
                bits["activation_bits"] = float(self.grids[read[0]].at(at_least).bits)
            found[module_of(key)] = bits
        return found

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Plan:
        """What `plain` wrote."""
        grids = [Grid.from_plain(grid) for grid in plain["grids"]]
        weights = {key: WeightRule(**rule) for key, rule in plain["weights"].items()}
        groups = {key: Group(**group) for key, group in plain["groups"].items()}
        return cls(**{**plain, "grids": grids, "weights": weights, "groups": groups})


def plan_sites(operations: Iterable[Operation], rules: Mapping[str, LayerRule]) -> Plan:
    """Decide what is rounded, so that every layer with a weight reads and writes int8.

    A batch norm and a ReLU that follow a layer belong to it: only what comes out of the last of them is rounded. Sums
    and concatenations are rounded if they stand between int8 operations; a stream that float operations read, such as
    the residual stream of a transformer, stays float. What only moves numbers keeps the grid of what it moves.

    A layer whose rule has no kernel is another matter: what it reads is rounded for it alone, and what it writes is as
    float as what a convolution of the papers writes.

    Args:
        operations: of one forward pass.
        rules: module -> what the recipe says of it; a layer that is not there stays float.
    """
    return _Planner(list(operations), rules).run()


class _Planner:
    def __init__(self, operations: list[Operation], rules: Mapping[str, LayerRule]) -> None:
        self.operations = operations
        self.plan = Plan()
        self._rules: dict[int, LayerRule] = {}
        for operation in operations:
            if operation.kind not in HEAVY:
                continue
            rule = rules.get(module_of(operation.key))
            if rule is None:
                operation.kind = "float"
                self.plan.left_float[module_of(operation.key)] = "asked for by `keep_float`"
                continue
            if operation.kind == "transposed":
                rule = replace(rule, weight=replace(rule.weight, per_channel=False))
            self._rules[id(operation)] = rule
            if rule.lacks_kernel:
                operation.kind = _OWN
        self._tails: dict[int, Operation] = {}
        self._groups: dict[int, Group] = {}
        self._grids: dict[int, int] = {}  # operation -> its grid
        on_kernels = (rule.activation for rule in self._rules.values() if not rule.lacks_kernel)
        self._usual = next((grid for grid in on_kernels if grid is not None), Grid())  # where no layer is near

    def run(self) -> Plan:
        for operation in self.operations:
            self._tails[id(operation)] = self._tail(operation)
        for operation in self.operations:
            if id(operation) in self._rules:
                self._layer(operation)
            elif operation.kind in ADDING or operation.kind in {"cat", "pool"}:
                self._join(operation)
        return self.plan

    def _tail(self, operation: Operation) -> Operation:
        """The last operation of the group that one kernel computes."""
        tail, batch_norm, relu = operation, None, None
        if operation.kind == "transposed" or not (operation.kind in HEAVY or operation.kind in ADDING):
            return tail  # the scale of its weight is one in all, and would not follow the batch norm
        follower = _only_user(tail)
        if operation.kind in HEAVY and follower is not None and follower.kind == BATCH_NORM:
            tail, follower = follower, _only_user(follower)
            batch_norm = tail.key
        if follower is not None and follower.kind in {"relu", "relu6"}:
            tail, relu = follower, follower.key
        self._groups[id(operation)] = Group(tail.key, batch_norm, relu)
        return tail

    def _layer(self, operation: Operation) -> None:
        ((place, source),) = operation.inputs
        rule = self._rules[id(operation)]
        if _origin(source).kind == "int":
            self.plan.left_float[module_of(operation.key)] = "reads whole numbers"
            return
        self.plan.weights[operation.key] = rule.weight
        if reason := rule.lacks_kernel:
            self.plan.without_kernel[operation.key] = reason
            self._layer_without_kernel(operation, place, source, rule)
            return
        self.plan.reads[operation.key] = self._round_input(operation, place, source, rule.activation)
        self._round_group(operation, rule.activation)

    def _layer_without_kernel(self, operation: Operation, place: int, source: Operation, rule: LayerRule) -> None:
        follower = _only_user(operation)
        if rule.activation is not None:
            self.plan.arguments.setdefault(operation.key, {})[place] = len(self.plan.grids)
            self.plan.grids.append(_known(source, rule.activation))
        batch_norm = follower.key if follower is not None and follower.kind == BATCH_NORM else None
        self.plan.groups[operation.key] = Group(batch_norm or operation.key, batch_norm)

    def _join(self, operation: Operation) -> None:
        sources = [source for _, source in operation.inputs]
        if not sources or any(_origin(source).kind == "int" for source in sources):
            return
        if not any(id(_origin(source)) in self._grids for source in sources):
            return
        if operation.kind in ADDING and any(map(_is_float, _readers(self._tails[id(operation)]))):
            return
        if operation.kind == "cat" and any(_is_rounded_by_readers(_origin(source)) for source in sources):
            return  # an element of a list is no argument of its own
        for place, source in operation.inputs:
            self._round_input(operation, place, source)
        if operation.kind == "pool" and id(_origin(sources[0])) in self._grids:
            self._grids[id(operation)] = self._grids[id(_origin(sources[0]))]
            self.plan.outputs[operation.key] = self._grids[id(operation)]
            self.plan.means.append(operation.key)
        elif operation.kind != "pool":
            self._round_group(operation)

    def _round_group(self, operation: Operation, usual: Grid | None = None) -> None:
        tail = self._tails[id(operation)]
        self.plan.groups[operation.key] = self._groups.get(id(operation), Group(tail.key))
        self._round(tail, usual)

    def _round_input(self, operation: Operation, place: int, source: Operation, usual: Grid | None = None) -> int:
        """The grid of what is read: rounded where it is made, but by its reader if no one operation gives it alone."""
        origin = _origin(source)
        if origin.gives_several:
            self.plan.grids.append(_known(origin, usual or self._usual))
            grid = len(self.plan.grids) - 1
        else:
            grid = self._grid(origin, usual)
        if _is_rounded_by_readers(origin):
            self.plan.arguments.setdefault(operation.key, {})[place] = grid
        else:
            self._round(origin, usual)
        return grid

    def _round(self, operation: Operation, usual: Grid | None) -> None:
        self.plan.outputs.setdefault(operation.key, self._grid(operation, usual))

    def _grid(self, operation: Operation, usual: Grid | None) -> int:
        """The grid of its result; the first layer that touches a tensor says how its range is found."""
        if id(operation) not in self._grids:
            self._grids[id(operation)] = len(self.plan.grids)
            self.plan.grids.append(_known(operation, usual or self._usual))
        return self._grids[id(operation)]


def _origin(operation: Operation) -> Operation:
    """The operation whose numbers these are."""
    while operation.kind == "move" and operation.inputs:
        operation = operation.inputs[0][1]
    return operation


def _is_rounded_by_readers(origin: Operation) -> bool:
    """Whether no operation makes it, or one that makes several tensors: output and states of an LSTM."""
    return origin.kind == "input" or origin.gives_several


def _known(operation: Operation, usual: Grid) -> Grid:
    """``usual``, with what the operation tells of its result."""
    origin = _origin(operation)
    cap = 6.0 if origin.kind == "relu6" else None
    grid = replace(usual, positive=_is_positive(origin), cap=cap)
    return replace(grid, learned="") if grid.learned == "clip" and not grid.positive else grid


def _is_positive(operation: Operation) -> bool:
    if operation.kind in {"pool", "cat"} and operation.inputs:
        return all(_is_positive(_origin(source)) for _, source in operation.inputs)
    return operation.kind in {"relu", "relu6"}


def _readers(operation: Operation) -> Iterator[Operation]:
    """The operations that compute with its numbers, wherever those have been moved or joined to."""
    for user in operation.users:
        if user.kind in {"move", "cat"}:
            yield from _readers(user)
        else:
            yield user


def _only_user(operation: Operation) -> Operation | None:
    return operation.users[0] if len(operation.users) == 1 and not operation.is_output else None


def _is_float(operation: Operation) -> bool:
    return operation.kind in {"float", "int", BATCH_NORM, "clamp", _OWN}
