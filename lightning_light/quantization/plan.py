"""Where numbers are rounded: decided once for the whole network, before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_light.quantization.operations import ADDING, BATCH_NORM, HEAVY
from lightning_light.quantization.places import module_of
from lightning_light.quantization.record import Operation

__all__ = ["Grid", "Group", "Plan", "plan_sites"]


@dataclass(frozen=True)
class Grid:
    """What is known of the values of one tensor before any was seen.

    Attributes:
        positive: nothing is below zero: a ReLU is part of the operation.
        cap: nothing is above it.
    """

    positive: bool = False
    cap: float | None = None


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
        arguments: operation -> position of an argument -> grid; for inputs of the network.
        weights: operation -> whether its weight has one scale a channel (else one in all).
        groups: operation -> what its kernel computes along with it.
        left_float: layers whose weights stay float, with the reason.
    """

    grids: list[Grid] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)
    arguments: dict[str, dict[int, int]] = field(default_factory=dict)
    weights: dict[str, bool] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    left_float: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Plan:
        """What `plain` wrote."""
        grids = [Grid(**grid) for grid in plain["grids"]]
        groups = {key: Group(**group) for key, group in plain["groups"].items()}
        return cls(**{**plain, "grids": grids, "groups": groups})


def plan_sites(operations: Iterable[Operation], *, keep_float: Collection[str] = ()) -> Plan:
    """Decide what is rounded, so that every layer with a weight reads and writes int8.

    A batch norm and a ReLU that follow a layer belong to it: only what comes out of the last of them is rounded. Sums
    and concatenations are rounded if they stand between int8 operations; a stream that float operations read, such as
    the residual stream of a transformer, stays float. What only moves numbers keeps the grid of what it moves.

    Args:
        operations: of one forward pass.
        keep_float: names of modules whose operations stay float.
    """
    listed = list(operations)
    for operation in listed:
        if module_of(operation.key) in keep_float and operation.kind in HEAVY:
            operation.kind = "float"
    return _Planner(listed, keep_float).run()


class _Planner:
    def __init__(self, operations: list[Operation], keep_float: Collection[str]) -> None:
        self.operations = operations
        self.plan = Plan()
        for operation in operations:
            if operation.kind == "float" and module_of(operation.key) in keep_float:
                self.plan.left_float[module_of(operation.key)] = "asked for by `keep_float`"
        self._tails: dict[int, Operation] = {}
        self._groups: dict[int, Group] = {}
        self._grids: dict[int, int] = {}  # operation -> its grid

    def run(self) -> Plan:
        for operation in self.operations:
            self._tails[id(operation)] = self._tail(operation)
        for operation in self.operations:
            if operation.kind in HEAVY:
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
        if _origin(source).kind == "int":
            self.plan.left_float[module_of(operation.key)] = "reads whole numbers"
            return
        self._round_input(operation, place, source)
        self._round_group(operation)
        self.plan.weights[operation.key] = operation.kind != "transposed"

    def _join(self, operation: Operation) -> None:
        sources = [source for _, source in operation.inputs]
        if not sources or any(_origin(source).kind == "int" for source in sources):
            return
        if not any(id(_origin(source)) in self._grids for source in sources):
            return
        if operation.kind in ADDING and any(map(_is_float, _readers(self._tails[id(operation)]))):
            return
        if operation.kind == "cat" and any(_origin(source).kind == "input" for source in sources):
            return  # an element of a list is no argument of its own
        for place, source in operation.inputs:
            self._round_input(operation, place, source)
        if operation.kind == "pool" and id(_origin(sources[0])) in self._grids:
            self._grids[id(operation)] = self._grids[id(_origin(sources[0]))]
            self.plan.outputs[operation.key] = self._grids[id(operation)]
        elif operation.kind != "pool":
            self._round_group(operation)

    def _round_group(self, operation: Operation) -> None:
        tail = self._tails[id(operation)]
        self.plan.groups[operation.key] = self._groups.get(id(operation), Group(tail.key))
        self._round(tail)

    def _round_input(self, operation: Operation, place: int, source: Operation) -> None:
        origin = _origin(source)
        if origin.kind == "input":
            places = self.plan.arguments.setdefault(operation.key, {})
            places[place] = self._grid(origin)
        else:
            self._round(origin)

    def _round(self, operation: Operation) -> None:
        self.plan.outputs.setdefault(operation.key, self._grid(operation))

    def _grid(self, operation: Operation) -> int:
        if id(operation) not in self._grids:
            positive = operation.kind in {"relu", "relu6"}
            cap = 6.0 if operation.kind == "relu6" else None
            self._grids[id(operation)] = len(self.plan.grids)
            self.plan.grids.append(Grid(positive, cap))
        return self._grids[id(operation)]


def _origin(operation: Operation) -> Operation:
    """The operation whose numbers these are."""
    while operation.kind == "move" and operation.inputs:
        operation = operation.inputs[0][1]
    return operation


def _readers(operation: Operation) -> Iterator[Operation]:
    """The operations that compute with its numbers, wherever those have been moved."""
    for user in operation.users:
        if user.kind == "move":
            yield from _readers(user)
        else:
            yield user


def _only_user(operation: Operation) -> Operation | None:
    return operation.users[0] if len(operation.users) == 1 and not operation.is_output else None


def _is_float(operation: Operation) -> bool:
    return operation.kind in {"float", "int", BATCH_NORM, "clamp"}
