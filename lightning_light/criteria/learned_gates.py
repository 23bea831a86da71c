"""Learned gates: one number in [0, 1] per channel, trained under a budget while all weights are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.batch_norm import InputRecorder
from lightning_light.criteria.gated_weights import GatedWeights, ungated_writers
from lightning_light.criteria.gathered import GateState, Gathered, Storage
from lightning_light.criteria.group_criterion import GroupCriterion
from lightning_light.criteria.output_distance import Distance, output_distance
from lightning_light.dependency import ChannelGroup
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated, plain_attention
from lightning_light.progress_bar import with_progress_bar
from lightning_light.validation import PositiveFloat, PositiveInt, validated

__all__ = ["GateProblem", "GateTrainer", "LearnedGates", "learn_gates"]

_LAST_TEMPERATURE = 0.1  # it starts at 1
_RAMP = 0.5  # fraction of the steps in which the budget tightens
_MARGIN = 0.01  # fraction of the budget left free, since open and closed gates do not add up to it exactly
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


@validated
@dataclass(frozen=True)
class LearnedGates(GroupCriterion):
    """Score each channel by a gate that is trained under the budget, with all weights and batch norms frozen.

    A gate ``g = sigmoid((a - s) / T)`` multiplies the weights that read the channel. The logits ``a`` are trained by
    Adam so that the outputs stay those of the network without gates; no labels are used. At each step the shift ``s``
    is solved for, so that the budget, tightened over the first half of the steps, is met. T falls from 1 to 0.1, and
    most gates end close to 0 or 1. The channels with the lowest logits are removed.

    It pays where much is removed and little training follows; see ``docs/methods/learned_gates.md``. Choose all
    channels at once: ``StructuredPruning(MACs(0.5), criterion=LearnedGates(), schedule=OneShot(at=0.1))``.

    The gates follow Castells and Yeom, 2021, "Automatic Neural Network Pruning that Efficiently Preserves the Model
    Accuracy" (AutoBot), https://arxiv.org/abs/2111.09635, which places them behind layers, adds the budget to the loss
    as a weighted penalty, and uses labels.

    Args:
        steps: training steps of the gates, one batch each, before a cut.
        lr: learning rate of the logits.
        distance: of the outputs with gates from those without: ``"kl"``, the Kullback-Leibler divergence of class
            probabilities, or ``"mse"``, the squared error relative to the variance, for all other outputs.
        class_dim: which dimension counts classes: -1 for ``(N, C)`` and tokens ``(N, T, C)``, 1 for ``(N, C, H, W)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    steps: PositiveInt = 100
    lr: PositiveFloat = 0.3
    distance: Distance = "kl"
    class_dim: int = -1

    needs: ClassVar[frozenset[str]] = frozenset({"gates"})

    @override
    def score_group(
        self, model: nn.Module, group: ChannelGroup, gathered: Gathered, *, generator: torch.Generator | None = None
    ) -> Tensor | None:
        return gathered.get("gates", group.name)


@dataclass(frozen=True, eq=False)
class GateProblem:
    """What gates are trained for.

    Attributes:
        groups: the channels that have gates.
        cost: widths of the groups, shape ``(groups,)``, not necessarily integers -> fraction of the budget's quantity
            that is left; differentiable.
        goal: the fraction to reach.
        floors: the smallest widths of the groups, shape ``(groups,)``, of type double.
        example: one call of the model.
    """

    groups: Sequence[ChannelGroup]
    cost: Callable[[Tensor], Tensor]
    goal: float
    floors: Tensor
    example: ExampleInput


class GateTrainer:
    """Train gates during a training run, one step per batch, beside the training of the weights.

    It takes the place of an `EvidenceCollector` and has its methods. The inputs of each training batch are used once
    more after the step, in evaluation mode and full precision. Its state lies in a plain dict of the method's state, so
    that a run that is interrupted between two steps continues bit for bit.

    Args:
        model: the network.
        criterion: how gates are trained.
        storage: returns the dict in which the state is kept.
        problem: returns what the gates are trained for; called once per cut.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: LearnedGates,
        storage: Callable[[], Storage],
        problem: Callable[[], GateProblem],
    ) -> None:
        self._model, self._criterion, self._storage, self._new_problem = model, criterion, storage, problem
        self._recorder = InputRecorder(model, samples=None)
        self._problem: GateProblem | None = None
        self._gated: GatedWeights | None = None

    @property
    def batches(self) -> int:
        """The number of steps since `forget`."""
        return int(self._storage().get("batches", 0))

    def begin_batch(self, gather: bool = True) -> None:
        """Start a training batch; with ``gather`` its inputs are recorded."""
        self._recorder.active = gather and self.batches < self._criterion.steps

    def observe_step(self, parameters: Iterable[Tensor]) -> None:
        """Do nothing: the gradients of weights are not used."""

    def end_batch(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Make one step with the inputs of this batch.

        Args:
            reduce: the mean over all processes, if there are several.

        Raises:
            UnsupportedError: the LightningModule was not called through its ``forward``, or is compiled as a whole.
        """
        calls = self._recorder.take()
        if calls:
            self.step(ExampleInput(**calls[0]), reduce)
        elif self._recorder.active:
            raise UnsupportedError(
                f"`criterion={self._criterion!r}` on `{type(self._model).__name__}`: expected a LightningModule that "
                "calls `self(...)` in `training_step`, with tensors, and is not compiled as a whole, found a step "
                "without such a call. Call `self(...)` there, or use `prune_channels(..., data=...)` before training."
            )
        self._recorder.active = False

    def step(self, call: ExampleInput, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Make one step of the gates.

        Args:
            call: of the model, with one batch.
            reduce: the mean over all processes, if there are several.
        """
        problem, gated, state = self._prepared()
        phase = self.batches / max(self._criterion.steps - 1, 1)
        logits = state["logits"].detach().requires_grad_()
        goal = problem.goal * (1.0 - _MARGIN)
        if goal < 1.0:
            tightened = max(goal, 1.0 - (1.0 - goal) * (phase + 0.02) / _RAMP)
            gates = solved_gates(logits, gated.owner, problem.floors, problem.cost, tightened, _LAST_TEMPERATURE**phase)
            gradient = self._gradient(gates, gated, call)
            gradient = (gradient if reduce is None else reduce(gradient)).cpu().double()
            if bool(gradient.isfinite().all()):
                _adam(state, torch.autograd.grad(gates, logits, gradient)[0], self._criterion.lr)
        self._storage()["batches"] = self.batches + 1

    def means(self) -> Gathered:
        """Return the logits: under ``"gates"``, one tensor per group."""
        state: GateState | None = self._storage().get("gates")
        if state is None:
            return Gathered()
        parts = torch.split(state["logits"], list(state["widths"].values()))
        return Gathered({"gates": dict(zip(state["widths"], parts, strict=True))}, self.batches)

    def forget(self) -> None:
        """Drop the gates: the next cut trains its own."""
        for name in ("gates", "batches"):
            self._storage().pop(name, None)
        self._problem = self._gated = None

    def follow(self, kept: Mapping[str, Mapping[int, Tensor]] | None) -> None:
        """Begin again after a change of structure."""
        self.forget()

    def remove(self) -> None:
        """Remove all hooks; more than once does no harm."""
        self._recorder.remove()

    def _prepared(self) -> tuple[GateProblem, GatedWeights, GateState]:
        """The problem, the gates' positions and the state, of the channels that there are now."""
        storage = self._storage()
        if self._problem is None:
            self._problem = self._new_problem()
        widths = {group.name: group.width for group in self._problem.groups}
        state: GateState | None = storage.get("gates")
        if state is None or state["widths"] != widths:
            writers = ungated_writers(self._model, self._problem.groups, self._problem.example)
            zeros = [torch.zeros(sum(widths.values()), dtype=torch.double) for _ in range(3)]
            state = GateState(widths=widths, writers=writers, logits=zeros[0], mean=zeros[1], square=zeros[2], steps=0)
            storage |= {"gates": state, "batches": 0}
            self._gated = None
        if self._gated is None:
            self._gated = GatedWeights(self._model, self._problem.groups, state["writers"])
        return self._problem, self._gated, state

    def _gradient(self, gates: Tensor, gated: GatedWeights, call: ExampleInput) -> Tensor:
        """The gradient of the distance with respect to the gates."""
        call = call.to(self._model)
        criterion, values = self._criterion, gates.detach().float().to(gated.device).requires_grad_()
        with isolated(self._model), plain_attention():
            plain = self._model(*call.args, **call.kwargs)
            with torch.enable_grad():
                distance = output_distance(gated.call(values, call), plain, criterion.distance, criterion.class_dim)
                return torch.autograd.grad(distance, values)[0]


def learn_gates(
    model: nn.Module, criterion: LearnedGates, problem: GateProblem, calls: Iterable[ExampleInput]
) -> Gathered:
    """Train gates on ``calls`` of ``model``, without a Trainer, and return the logits; see `GateTrainer.means`.

    Args:
        model: left as it is.
        criterion: how gates are trained.
        problem: what they are trained for.
        calls: at least ``criterion.steps`` calls of the model, a batch each.

    Raises:
        ValueError: there are fewer.
    """
    storage: Storage = {}
    trainer = GateTrainer(model, criterion, lambda: storage, lambda: problem)
    trainer.remove()
    steps = criterion.steps
    for call in with_progress_bar(islice(calls, steps), steps, "Learning gates", shown=True):
        trainer.step(call)
    if trainer.batches < steps:
        raise ValueError(
            f"`prune_channels(criterion={criterion!r})`: expected {steps} batches in `data`, or `data` that can be "
            f"iterated several times, found an iterator with {trainer.batches}. Pass a DataLoader or a list."
        )
    return trainer.means()


def solved_gates(
    logits: Tensor, owner: Tensor, floors: Tensor, cost: Callable[[Tensor], Tensor], goal: float, temperature: float
) -> Tensor:
    """Return the gates ``sigmoid((logits - s) / temperature)`` whose widths cost ``goal``; differentiable.

    A group that would be narrower than its floor has a smaller shift of its own, with which its gates add up to the
    floor. The derivatives of the shifts are those of the implicit function: ``ds/da_i = -(dC/da_i) / (dC/ds)``.

    Args:
        logits: shape ``(gates,)``, of type double.
        owner: the group of each gate.
        floors: the smallest sums of the gates of each group, shape ``(groups,)``.
        cost: of the sums, a scalar; it rises with each of them.
        goal: at most the cost of open gates; where the floors cost more, all groups are at their floors.
        temperature: above 0.
    """

    def gates(shifts: Tensor, logits: Tensor = logits) -> Tensor:
        return torch.sigmoid((logits - shifts[owner]) / temperature)

    def widths(gates: Tensor) -> Tensor:
        return torch.zeros_like(floors).index_add(0, owner, gates)

    with torch.no_grad():
        low, high = logits.min() - 20 * temperature, logits.max() + 20 * temperature
        own = _bisected(lambda s: widths(gates(s)) > floors, low.expand_as(floors), high.expand_as(floors))
        shared = _bisected(lambda s: cost(widths(gates(torch.minimum(own, s)))) > goal, low, high)
        bound = own < shared
        found = gates(own)
        slopes = -widths(found * (1 - found)) / temperature
    sums, shift = widths(gates(own)), shared.clone().requires_grad_()
    own = own - (sums - sums.detach()) / slopes.clamp_max(-1e-6)
    fixed = gates(torch.where(bound, own.detach(), shift), logits.detach())
    (slope,) = torch.autograd.grad(cost(widths(fixed)), shift)
    solved = cost(widths(gates(torch.where(bound, own, shared))))
    moved = shared - (solved - solved.detach()) / slope.clamp_max(-1e-6)
    return gates(torch.where(bound, own, moved))


def _bisected(exceeds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return the numbers up to which ``exceeds`` holds, element by element."""
    for _ in range(40):
        middle = (low + high) / 2
        above = exceeds(middle)
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def _adam(state: GateState, gradient: Tensor, lr: float) -> None:
    """One step of Adam (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980), in place."""
    state["steps"] += 1
    state["mean"].lerp_(gradient, 1 - _BETA1)
    state["square"].lerp_(gradient.square(), 1 - _BETA2)
    mean = state["mean"] / (1 - _BETA1 ** state["steps"])
    scale = (state["square"] / (1 - _BETA2 ** state["steps"])).sqrt() + _EPS
    state["logits"] -= lr * mean / scale
