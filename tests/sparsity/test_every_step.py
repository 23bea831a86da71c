"""Every method and pattern after every step of an optimizer: exact sparsity, whole units, N:M, fan-in, no leak."""

from typing import Any

import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from lightning_light.budgets import Sparsity
from lightning_light.sparsity import NM, SET, Block, Column, Connections, Filter, Kernel, RigL, Row, SRigL, Unstructured
from lightning_light.sparsity.mask_enforcer import MaskEnforcer
from lightning_light.sparsity.options import WeightPruningOptions
from lightning_light.sparsity.planning import PruningPlan
from lightning_light.sparsity.scope import Scope
from lightning_light.sparsity.sr_ste import StraightThroughMasks
from lightning_light.sparsity.weights import MaskableWeight, find_weights
from lightning_light.targets import Targets

SEEDS = st.integers(0, 10_000)
SCOPES = st.sampled_from(["local", "global", "erk", "lamp"])
UNITS = st.sampled_from([Unstructured(), Block(4, 1), Block(2, 2), Filter(), Kernel(), Row(), Column()])
METHODS = st.sampled_from([SET(), RigL(), SRigL(), SRigL(0.9, 0.9)])
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01, weight_decay=0.01),
}
NAMES = st.sampled_from(sorted(OPTIMIZERS))
STEPS = 5


class Run:
    """A network under an optimizer, whose gradients are random and dense: the hardest case for a mask."""

    def __init__(self, seed: int, optimizer: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(4, 8, 3),
            nn.Conv1d(8, 8, 5),
            nn.ConvTranspose2d(8, 4, 3),
            nn.Conv2d(8, 16, 3, groups=2),
            nn.Linear(16, 12),
        )
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=self.generator)
        self.weights = find_weights(self.model, Targets(), "test")
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.masks: dict[str, Tensor] = {}
        self.enforcer = MaskEnforcer(self.weights, lambda: self.masks)
        self.enforcer.watch([self.optimizer])

    def scores(self) -> dict[str, Tensor]:
        return {weight.name: weight.oriented(weight.parameter.detach().square()) for weight in self.weights}

    def mask(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        self.enforcer.apply([self.optimizer])

    def step(self, before: Any = None) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=self.generator)
        (before or self.enforcer.before_step)(self.optimizer)
        self.optimizer.step()

    def assert_tight(self, masks: dict[str, Tensor]) -> None:
        for weight in self.weights:
            state = self.optimizer.state[weight.parameter].values()
            moments = [value for value in state if isinstance(value, Tensor) and value.shape == weight.parameter.shape]
            for tensor in (weight.parameter.detach(), weight.parameter.grad, *moments):
                assert not bool(tensor[~masks[weight.name]].any())


def at_most(weight: MaskableWeight, tensor: Tensor, n: int, m: int) -> bool:
    """Whether no group of ``m`` neighbouring inputs of ``tensor`` has more than ``n`` that are not zero."""
    groups = (weight.oriented(tensor) != 0).movedim(1, -1).reshape(-1, m)
    return int(groups.sum(dim=1).max()) <= n


@given(seed=SEEDS, pattern=UNITS, scope=SCOPES, optimizer=NAMES, end=st.floats(0.0, 0.9))
@settings(max_examples=40, deadline=None)
def test_gradual_pruning(seed, pattern, scope: Scope, optimizer, end) -> None:
    run, masks = Run(seed, optimizer), {}
    total = sum(weight.parameter.numel() for weight in run.weights)
    plan = PruningPlan(WeightPruningOptions(Sparsity(end), pattern=pattern, scope=scope), run.weights, {})
    for step in range(1, STEPS + 1):
        amount, before = end * step / STEPS, masks
        masks = plan.masks(run.scores(), step / STEPS, before)
        run.mask(masks)
        run.step()
        run.assert_tight(masks)
        sizes = []
        for weight in run.weights:
            mask = masks[weight.name]
            assert not bool((mask & ~before.get(weight.name, mask)).any())
            units = pattern.pool(weight.oriented(mask).float())
            assert set(units.unique().tolist()) <= {0.0, 1.0}  # whole units
            sizes.append(mask.numel() // units.numel())
            if scope == "local":
                wanted = min(round(amount * units.numel()), units.numel() - 1)
                assert int((units == 0.0).sum()) == max(wanted, 0)
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        if scope != "local" and set(sizes) == {1}:
            assert zeros == round(amount * total)
        elif scope in ("global", "lamp"):
            assert round(amount * total) - max(sizes) < zeros <= round(amount * total) or amount == 0.0


@given(
    seed=SEEDS,
    shape=st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4)]),
    optimizer=NAMES,
)
@settings(max_examples=20, deadline=None)
def test_n_of_m(seed, shape, optimizer) -> None:
    run, masks, pattern = Run(seed, optimizer), {}, NM(*shape)
    plan = PruningPlan(WeightPruningOptions(pattern=pattern), run.weights, {})
    for step in range(STEPS):
        fraction = (step + 1) / STEPS
        masks = plan.masks(run.scores(), fraction, masks)
        run.mask(masks)
        run.step()
        run.assert_tight(masks)
        for weight in run.weights:
            assert at_most(weight, weight.parameter.detach(), pattern.kept_at(fraction), pattern.m)
            assert int(masks[weight.name].sum()) * pattern.m == pattern.kept_at(fraction) * weight.parameter.numel()


@given(seed=SEEDS, shape=st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4)]), optimizer=NAMES)
@settings(max_examples=20, deadline=None)
def test_sr_ste(seed, shape, optimizer) -> None:
    run, pattern = Run(seed, optimizer), NM(*shape)
    plan = PruningPlan(WeightPruningOptions(pattern=pattern), run.weights, {})
    dense = {weight.name: weight.parameter.detach().clone() for weight in run.weights}
    masks = plan.masks(run.scores(), 1.0)
    state = {"masks": masks, "per_weight": {"dense": dense}, "fraction": 1.0}
    through = StraightThroughMasks(run.weights, pattern, 2e-4, lambda: state)
    run.enforcer.release()
    through.watch([run.optimizer])
    for _ in range(STEPS):
        run.step(before=through.before_step)
        for weight in run.weights:
            assert at_most(weight, weight.parameter.detach(), pattern.n, pattern.m)
            assert torch.equal(weight.parameter.detach(), dense[weight.name] * masks[weight.name])


@given(seed=SEEDS, method=METHODS, optimizer=NAMES, amount=st.floats(0.3, 0.95))
@settings(max_examples=30, deadline=None)
def test_dynamic_sparse_training(seed, method, optimizer, amount) -> None:
    run = Run(seed, optimizer)
    masks = {}
    for weight in run.weights:
        facing = weight.oriented(torch.rand(weight.parameter.shape, generator=run.generator))
        kept = max(1, round((1.0 - amount) * facing.numel()))
        masks[weight.name] = weight.oriented(method.initial_mask(facing, kept)).contiguous()
    first = {name: int(mask.sum()) for name, mask in masks.items()}
    run.mask(masks)
    for _ in range(STEPS):
        run.step()
        run.assert_tight(masks)
        for weight in run.weights:
            before, gradient = masks[weight.name], torch.randn(weight.parameter.shape, generator=run.generator)
            now = Connections(
                weight.oriented(weight.parameter.detach()),
                weight.oriented(before),
                weight.oriented(gradient),
                first[weight.name],
                run.generator,
            )
            masks[weight.name] = weight.oriented(method.update(now, method.fraction)).contiguous()
            if isinstance(method, SRigL):
                fan_ins = weight.oriented(masks[weight.name]).flatten(1).sum(dim=1)
                assert len(set(fan_ins[fan_ins > 0].tolist())) == 1
            else:
                assert int(masks[weight.name].sum()) == first[weight.name]
        run.mask(masks)  # what is new starts at zero, in weight and in state
        run.assert_tight(masks)
