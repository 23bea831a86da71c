"""Budgets: what a run is to reach. Measured and solved for, never guessed.

A budget measures its quantity and names the value to reach; the schedule determines how fast.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from typing_extensions import override

from lightning_light.errors import UnsupportedError
from lightning_light.helper_networks import helper_networks, inside
from lightning_light.merging import is_training_branch
from lightning_light.runtime import Runtime
from lightning_light.validation import Fraction, OpenFraction, PositiveInt, check_argument, validated

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_light.example_input import ExampleInput

__all__ = ["Budget", "Channels", "Latency", "MACs", "Params", "RelativeBudget", "Size", "Sparsity", "require_reducible"]

Change: TypeAlias = Literal["channels", "factors", "masks", "operators"]

_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_VERBS = {
    "channels": "removing channels",
    "factors": "low-rank factors",
    "masks": "masking weights",
    "operators": "lighter operators",
}
_REDUCERS = {"channels": "`StructuredPruning`", "factors": "`LowRankFactorization`", "masks": "`WeightPruning`"}


class Budget(ABC):
    """A quantity of a model, and the value that it is to reach.

    A budget of your own is one frozen dataclass with `goal` and `measure`; where the quantity is not proportional to
    the multiply-accumulates, with `tensor_costs` too, by which methods estimate before they measure.

    Attributes:
        quantity: name of the quantity, in logs and messages.
        reducible_by: which changes of a network reduce it: removed ``"channels"``, low-rank ``"factors"``, ``"masks"``,
            lighter ``"operators"``.
        runs_model: whether `measure` needs the values of the tensors; where it is False their shapes are enough.
    """

    # No annotations: jsonargparse would resolve them in the module of each subclass.
    quantity = ""
    reducible_by = frozenset({"channels", "factors", "operators"})
    runs_model = True

    @abstractmethod
    def goal(self, dense: float) -> float:
        """Return the value of the quantity at the end, for a model that starts at ``dense``."""

    @abstractmethod
    def measure(self, model: nn.Module, example: ExampleInput | None) -> float:
        """Measure the quantity of ``model`` as it is; the model is left as found.

        Args:
            model: any module.
            example: how it is called; None where that is not known.

        Raises:
            ValueError: an example is needed, and there is none.
        """

    @property
    def channel_cost(self) -> float | None:
        """What one removed channel takes off the quantity, where that is the same for every channel."""
        return None

    def at(self, dense: float, fraction: float) -> float:
        """Return the value at ``fraction`` of the way to the goal: ``dense + fraction * (goal - dense)``.

        Args:
            dense: value of the quantity before compression.
            fraction: in [0, 1], from a schedule.

        Example:
            >>> MACs(0.4).at(dense=1000.0, fraction=0.5)
            700.0
        """
        return dense + fraction * (self.goal(dense) - dense)

    def tensor_costs(self, model: nn.Module, example: ExampleInput | None) -> dict[str, float]:
        """Attribute the quantity to the tensors of ``model``, for an estimate of what a smaller tensor would cost.

        By default each module's share of the multiply-accumulates, divided among its weights by their elements. Work
        without a weight (the products of attention scores) belongs to no tensor.

        Raises:
            ValueError: an example is needed, and there is none.
        """
        macs = _macs_by_module(self, model, example)
        return _attributed(model, macs, self.measure(model, example) / max(sum(macs.values()), 1))


@validated
def require_reducible(call: str, budget: Budget, by: Change) -> None:
    """Refuse a budget whose quantity the changes of a method do not reduce.

    Args:
        call: the callback or function, for the error message.
        budget: any budget.
        by: what the method does: removes ``"channels"``, makes low-rank ``"factors"``, sets ``"masks"``, puts
            lighter ``"operators"`` in the place of layers.

    Raises:
        ValueError: ``budget`` cannot be reached in this way.

    Example:
        >>> require_reducible("StructuredPruning", Sparsity(0.5), "channels")
        Traceback (most recent call last):
            ...
        ValueError: `StructuredPruning(Sparsity(amount=0.5))`: expected a budget that ... Use `WeightPruning`...
    """
    if by not in budget.reducible_by:
        others = " or ".join(_REDUCERS[change] for change in sorted(budget.reducible_by) if change in _REDUCERS)
        raise ValueError(
            f"`{call}({budget!r})`: expected a budget that {_VERBS[by]} can reach, found one of {budget.quantity}. "
            + (f"Use {others} for it." if others else f"Give another budget, for instance `{call}(MACs(0.5))`.")
        )


@dataclass(frozen=True)
class RelativeBudget(Budget):
    """Base class of budgets that keep a fraction of the dense model's quantity.

    Args:
        remaining: the fraction that stays, in (0, 1].

    Raises:
        ValueError: unless ``0 < remaining <= 1``.
    """

    remaining: OpenFraction

    def __post_init__(self) -> None:  # for subclasses that are not `validated`
        check_argument(type(self).__name__, "remaining", self.remaining, OpenFraction)

    @override
    def goal(self, dense: float) -> float:
        return self.remaining * dense


@validated
@dataclass(frozen=True)
class MACs(RelativeBudget):
    """Keep ``remaining`` of the multiply-accumulates of one forward pass, per sample.

    Args:
        remaining: the fraction that stays, in (0, 1].

    Raises:
        ValueError: unless ``0 < remaining <= 1``.

    Example:
        >>> MACs(0.5).goal(dense=1000.0)
        500.0
    """

    quantity = "macs"
    runs_model = False

    @override
    def measure(self, model: nn.Module, example: ExampleInput | None) -> float:
        return sum(_macs_by_module(self, model, example).values()) / _given(self, example).samples

    @override
    def tensor_costs(self, model: nn.Module, example: ExampleInput | None) -> dict[str, float]:
        return _attributed(model, _macs_by_module(self, model, example), 1.0 / _given(self, example).samples)


@validated
@dataclass(frozen=True)
class Params(RelativeBudget):
    """Keep ``remaining`` of the parameters.

    Args:
        remaining: the fraction that stays, in (0, 1].

    Raises:
        ValueError: unless ``0 < remaining <= 1``.

    Example:
        >>> Params(0.5).measure(nn.Linear(3, 2), None)
        8.0
    """

    quantity = "params"
    runs_model = False

    @override
    def measure(self, model: nn.Module, example: ExampleInput | None) -> float:
        return sum(self.tensor_costs(model, example).values())

    @override
    def tensor_costs(self, model: nn.Module, example: ExampleInput | None) -> dict[str, float]:
        counts = _counts(model, example)
        counted = ((name, parameter) for name, parameter in model.named_parameters() if counts(name))
        return {name: float(parameter.numel()) for name, parameter in counted}


@validated
@dataclass(frozen=True)
class Channels(RelativeBudget):
    """Keep ``remaining`` of the channels that can be removed.

    Args:
        remaining: the fraction that stays, in (0, 1].

    Raises:
        ValueError: unless ``0 < remaining <= 1``.
    """

    quantity = "channels"
    reducible_by = frozenset({"channels"})
    runs_model = False
    channel_cost = 1.0

    @override
    def measure(self, model: nn.Module, example: ExampleInput | None) -> float:
        from lightning_light.dependency import trace_dependencies

        call = _given(self, example)
        graph = trace_dependencies(model, call.args, call.kwargs)
        return float(sum(group.width for group in graph.groups if group.reason is None))

    @override
    def tensor_costs(self, model: nn.Module, example: ExampleInput | None) -> dict[str, float]:
        return {}  # `channel_cost` says it exactly


@validated
@dataclass(frozen=True)
class Sparsity(Budget):
    """Set ``amount`` of the weights to zero.

    Args:
        amount: the fraction of zeros, in [0, 1].

    Raises:
        ValueError: unless ``0 <= amount <= 1``.

    Example:
        >>> Sparsity(0.9).at(dense=0.0, fraction=0.5)
        0.45
    """

    quantity = "sparsity"
    reducible_by = frozenset({"masks"})

    amount: Fraction

    @override
    def goal(self, dense: float) -> float:
        return self.amount

    @override
    def measure(self, model: nn.Module, example: ExampleInput | None) -> float:
        """Return the fraction of zeros in all weights of two dimensions and more."""
        from lightning_light.measure.sparsity import zero_fraction

        return zero_fraction(parameter for parameter in model.parameters() if parameter.dim() > 1)

    @override
    def tensor_costs(self, model: nn.Module, example: ExampleInput | None) -> dict[str, float]:
        weights = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
        elements = max(sum(weight.numel() for weight in weights.values()), 1)
        zeros = {name: weight.numel() - int(weight.count_nonzero()) for name, weight in weights.items()}
        return {name: count / elements for name, count in zeros.items()}


@validated
@dataclass(frozen=True)
class Size(Budget):
    """Keep the stored tensors (parameters and persistent buffers) below ``limit`` bytes.

    Args:
        limit: ``"2 MB"`` (decimal: B, kB, MB, GB), ``"1.5 MiB"`` (binary: KiB, MiB, GiB), or an int: bytes.

    Raises:
        TypeError: ``limit`` is neither a string nor an int.
        ValueError: ``limit`` cannot be read as a size, or is not above 0.

    Example:
        >>> Size("2 MB").bytes, Size("1.5 MiB").bytes, Size(4096).bytes
        (2000000, 1572864, 4096)
    """

    quantity = "bytes"
    runs_model = False

    limit: int | str

    def __post_init__(self) -> None:
        if not self.bytes > 0:
            raise ValueError(_unreadable("Size", self.limit, "a size above 0", _BYTES, "2 MB"))

    @property
    def bytes(self) -> int:
        """The limit in bytes."""
        return int(self.limit if isinstance(self.limit, int) else round(_quantity("Size", self.limit, _BYTES, "2 MB")))

    @override
    def goal(self, dense: float) -> float:
        return float(self.bytes)

    @override
    def measure(self, model: nn.Module, example: ExampleInput | None) -> float:
        return sum(self.tensor_costs(model, example).values())

    @override
    def tensor_costs(self, model: nn.Module, example: ExampleInput | None) -> dict[str, float]:
        from lightning_light.measure.size import stored_tensors

        counts = _counts(model, example)
        counted = ((name, tensor) for name, tensor in stored_tensors(model).items() if counts(name))
        return {name: float(tensor.numel() * tensor.element_size()) for name, tensor in counted}


@validated
@dataclass(frozen=True)
class Latency(Budget):
    """Keep one forward pass below ``limit`` seconds, on the machine where it is measured.

    Args:
        limit: ``"4 ms"``, ``"250 us"``, ``"1.5 s"``, or a number: seconds.
        runtime: an exporter, in whose runtime the written file is timed, on one sample: ``ONNX()``,
            ``TorchScriptLite()``, ``ExecuTorch()``. None for the network itself in PyTorch, on its own device, with the
            example as it is.
        threads: number of threads of the runtime; of PyTorch it is ``torch.get_num_threads()``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``limit`` cannot be read as a time, or is not above 0; ``threads`` is below 1, or given without a
            runtime.

    Example:
        >>> Latency("4 ms").seconds, Latency(0.5).seconds
        (0.004, 0.5)
    """

    quantity = "seconds"

    limit: float | str
    runtime: Runtime | None = None
    threads: PositiveInt = 1

    def __post_init__(self) -> None:
        if not self.seconds > 0.0:
            raise ValueError(_unreadable("Latency", self.limit, "a time above 0", _SECONDS, "4 ms"))
        if self.runtime is None and self.threads != 1:
            raise ValueError(
                f"`{self!r}`: expected `threads` of a runtime, found no runtime. Give one, for instance "
                f"`Latency({self.limit!r}, runtime=ONNX(), threads={self.threads})`, or call `torch.set_num_threads`."
            )

    @property
    def seconds(self) -> float:
        """The limit in seconds."""
        return _quantity("Latency", self.limit, _SECONDS, "4 ms") if isinstance(self.limit, str) else float(self.limit)

    @override
    def goal(self, dense: float) -> float:
        return self.seconds

    @override
    def measure(self, model: nn.Module, example: ExampleInput | None) -> float:
        """Return the median of several calls after a warm-up: 20 of the network, or those of its file in ``runtime``.

        Raises:
            ValueError: there is no example.
            TraceError: the file format cannot express the model.
            UnsupportedError: the runtime is not installed; or the example is a call of a training step, and a file
                contains ``forward``.
        """
        from lightning_light.isolation import isolated
        from lightning_light.measure.latency import measure_latency

        call = _given(self, example)
        if self.runtime is None:
            with isolated(model):
                return measure_latency(synchronized(model, call), warmup=3, runs=20).median
        self.check_runtime(model, call)
        return self.runtime.seconds(model, call, self.threads)

    def check_runtime(self, model: nn.Module, example: ExampleInput) -> None:
        """Check that the runtime is installed, and that a file for ``example`` can be written.

        Raises:
            UnsupportedError: it is not installed, or the example is not a call of ``forward``.
        """
        if self.runtime is not None:
            self.runtime.check()
        if example.method != "forward":
            raise UnsupportedError(
                f"`{self!r}` of `{type(model).__name__}`: expected a call of `forward`, of which the file is written, "
                f"found one of `{example.method}`. Set `self.example_input_array` in the module."
            )


def _counts(model: nn.Module, example: ExampleInput | None) -> Callable[[str], bool]:
    """Return a test whether a tensor counts: not in branches, nor in frozen networks that ``forward`` does not call."""
    merged_away = is_training_branch(model)
    helpers = [] if example is None or example.method != "forward" else helper_networks(model, example)
    return lambda name: not merged_away(name) and not inside(name, helpers)


def _given(budget: Budget, example: ExampleInput | None) -> ExampleInput:
    if example is None:
        raise ValueError(
            f"`{budget!r}.measure(model, None)`: expected an example input, on which {budget.quantity} depend, found "
            "None. Give `example_inputs`, or set `example_input_array` in the LightningModule."
        )
    return example


def _macs_by_module(budget: Budget, model: nn.Module, example: ExampleInput | None) -> dict[str, int]:
    from lightning_light.measure.cost import count_cost

    call = _given(budget, example)
    return count_cost(model, call.args, call.kwargs).macs_by_module


def _attributed(model: nn.Module, macs: Mapping[str, int], scale: float) -> dict[str, float]:
    """Each module's multiply-accumulates times ``scale``, divided among its weights by their elements."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            weights.setdefault(_computing_module(name, macs), []).append(name)
    costs: dict[str, float] = {}
    for module, names in weights.items():
        elements = sum(tensors[name].numel() for name in names)
        costs |= {name: macs.get(module, 0) * scale * tensors[name].numel() / elements for name in names}
    return costs


def _computing_module(tensor: str, macs: Mapping[str, int]) -> str:
    """The module that computes with ``tensor``: its owner, or one above (of a parametrization, of a projection)."""
    path = tensor.rpartition(".")[0]
    while path not in macs and "." in path:
        path = path.rpartition(".")[0]
    return path


def synchronized(model: nn.Module, example: ExampleInput) -> Callable[[], object]:
    """Return one forward pass that has ended when it returns, on a GPU as well."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}

    def run() -> None:
        model(*example.args, **example.kwargs)
        for device in devices:
            torch.cuda.synchronize(device)

    return run


def _quantity(kind: str, text: str, units: dict[str, int] | dict[str, float], example: str) -> float:
    """Read ``"2 MB"``: a number, then a unit, in any case, with or without a space."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zµ]+)\s*", text.replace("\u03bc", "µ"), flags=re.IGNORECASE)
    scales = {unit.lower(): scale for unit, scale in units.items()}
    if found is None or found[2].lower() not in scales:
        raise ValueError(_unreadable(kind, text, "a number and a unit", units, example))
    return float(found[1]) * scales[found[2].lower()]


def _unreadable(kind: str, limit: object, expected: str, units: dict[str, int] | dict[str, float], example: str) -> str:
    return f"`{kind}({limit!r})`: expected {expected} ({', '.join(units)}). Write for instance `{kind}({example!r})`."
