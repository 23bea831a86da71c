"""Replace convolutions by lighter operators without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_light.batch_norm import measure_statistics, move_statistics
from lightning_light.budgets import Budget, require_reducible
from lightning_light.calibration import calls_from
from lightning_light.criteria.output_distance import Distance
from lightning_light.example_input import ExampleInput
from lightning_light.measure.latency_table import LatencyTable, quantity
from lightning_light.substitution.apply import apply_operators
from lightning_light.substitution.candidates import find_candidates
from lightning_light.substitution.operators import Operator
from lightning_light.substitution.options import SubstitutionOptions
from lightning_light.substitution.plan import SubstitutionPlan, plan_substitution
from lightning_light.surgery.attachment import recording, state_of
from lightning_light.targets import Targets
from lightning_light.validation import NonNegativeInt, PositiveInt, validated

__all__ = ["substitute_operators"]


@validated
def substitute_operators(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget,
    *,
    operators: Sequence[Operator] | None = SubstitutionOptions.operators,
    targets: Targets | str | list[str] | None = SubstitutionOptions.targets,
    data: Iterable[Any] | None = None,
    fit_steps: NonNegativeInt = SubstitutionOptions.fit_steps,
    distance: Distance = SubstitutionOptions.distance,
    class_dim: int = SubstitutionOptions.class_dim,
    calibration_batches: PositiveInt = SubstitutionOptions.calibration_batches,
    correct_batch_norm: bool = SubstitutionOptions.correct_batch_norm,
    optimizers: Iterable[Optimizer] = (),
    dry_run: bool = False,
    progress_bar: bool = True,
) -> SubstitutionPlan:
    """Replace convolutions of ``model`` by lighter operators, in place, until the budget is met.

    Each operator is fitted to each layer on the layer's own inputs, and scored by how much the network's outputs change
    with it alone. Of all assignments within the budget the one with the lowest sum of scores is taken.

    Args:
        model: any module.
        example_inputs: what ``model`` is called with: a tensor, a tuple of positional arguments or a dict of keyword
            arguments.
        budget: what the model is to reach. A relative budget counts from the model before its first compression by
            this package.
        operators: what may take the place of a convolution; `Operator` is the base class of your own. None:
            `DepthwiseSeparable` with multipliers 1, 2 and 4, ``GroupShuffle(2)``, ``Ghost(2)`` and ``Fire(0.5)``, none
            of which starts from random weights.
        targets: convolutions that may be replaced: patterns or `Targets`; all by default.
        data: batches; of a tuple or list the first item is the model's input, a mapping is its keyword arguments. The
            example inputs by default, which are rarely enough.
        fit_steps: optimizer steps in which each candidate is fitted to the layer's outputs; 0 for its start alone.
        distance: of the network's outputs, for the scores: ``"mse"`` or ``"kl"``.
        class_dim: which dimension of the outputs counts classes, for ``"kl"``.
        calibration_batches: how many batches of ``data`` are used.
        correct_batch_norm: move the batch-norm statistics by what the substitution did to them.
        optimizers: the parameters of the operators take the places of those of the layers.
        dry_run: only plan.
        progress_bar: show progress where there is a terminal.

    Returns:
        What was replaced, the scores and costs of all candidates, and why other convolutions were left alone.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
        BudgetError: the budget cannot be reached; the model is unchanged.
        TargetError: ``targets`` match no module.
        UnsupportedError: a layer was changed by a later method, for instance quantized.

    Example:
        >>> import torch
        >>> from lightning_light import MACs
        >>> from lightning_light.substitution import DepthwiseSeparable
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        >>> plan = substitute_operators(model, torch.randn(4, 3, 8, 8), MACs(0.5), operators=[DepthwiseSeparable()])
        >>> plan.operators
        {'2': DepthwiseSeparable(multiplier=1)}
        >>> model[2]
        Sequential(
          (0): Conv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), groups=16, bias=False)
          (1): Conv2d(16, 16, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    require_reducible("substitute_operators", budget, "operators")
    options = SubstitutionOptions(
        operators, targets, fit_steps, distance, class_dim, calibration_batches, correct_batch_norm
    )
    example, optimizers = ExampleInput.of(example_inputs).to(model), list(optimizers)
    batches = list(calls_from("substitute_operators", model, example_inputs, data, limit=calibration_batches))
    table = LatencyTable.of(budget)
    measure = partial(quantity, budget, model, example, table)
    dense = state_of(model).reference(budget.quantity, measure)
    candidates = find_candidates(model, budget, example, options, optimizers=optimizers or None, table=table)
    goal = budget.goal(dense)
    plan = plan_substitution(model, budget, candidates, batches, goal, options, measure, progress_bar=progress_bar)
    if plan.layers and not dry_run:
        calls = batches if correct_batch_norm and data is not None else []
        with recording(model) as state:
            state.reference(budget.quantity, lambda: dense)
            before = measure_statistics(model, calls)
            state.record(apply_operators(model, plan, optimizers=optimizers))
            move_statistics(model, before, measure_statistics(model, calls), {})
    return plan
