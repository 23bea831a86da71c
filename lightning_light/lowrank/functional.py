"""Factorize a network, or a finished checkpoint, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_light.batch_norm import measure_statistics, move_statistics
from lightning_light.budgets import Budget
from lightning_light.criteria.data import collect_evidence
from lightning_light.criteria.gathered import Gathered
from lightning_light.errors import LightningLightError
from lightning_light.example_input import ExampleInput, example_of_batch
from lightning_light.lowrank.apply import METHOD, apply_factors, check_unowned
from lightning_light.lowrank.calibration import first_batches, layer_evidence, watched_modules
from lightning_light.lowrank.fits import Fit
from lightning_light.lowrank.layers import FactorizableLayer, find_layers
from lightning_light.lowrank.measurement import FileTimer, LayerTimer, OutputProbe, goal_of, quantity_of
from lightning_light.lowrank.options import FactorizationOptions, Form, RankAllocation, candidate_forms, check_request
from lightning_light.lowrank.plan import FactorizationPlan, Goal, Planner, unreachable
from lightning_light.lowrank.ranks import RankRule
from lightning_light.measure.latency_table import LatencyTable, lowered
from lightning_light.order import Stage
from lightning_light.surgery.attachment import attach, attach_if_kept, has_state
from lightning_light.surgery.checkpoint import load_from_checkpoint, save_converted
from lightning_light.targets import Targets, as_targets
from lightning_light.validation import PositiveInt, validated

__all__ = ["factorize", "factorize_checkpoint", "plan_layers", "require_file_reachable"]


@validated
def factorize(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | RankRule,
    *,
    fit: Fit = FactorizationOptions.fit,
    form: Form = FactorizationOptions.form,
    targets: Targets | str | list[str] | None = FactorizationOptions.targets,
    split: dict[str, int] | None = FactorizationOptions.split,
    allocation: RankAllocation = FactorizationOptions.allocation,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    calibration_batches: PositiveInt = FactorizationOptions.calibration_batches,
    correct_batch_norm: bool = FactorizationOptions.correct_batch_norm,
    optimizers: Iterable[Optimizer] = (),
    dry_run: bool = False,
) -> FactorizationPlan:
    """Replace layers of ``model`` by low-rank factors, in place.

    Args:
        model: any module. Later checkpoints of a LightningModule contain what was done.
        example_inputs: of one call: a tensor, a tuple of positional or a dict of keyword arguments, or an
            `ExampleInput`.
        budget: as in `LowRankFactorization`, like ``fit``, ``form``, ``targets``, ``split`` and ``allocation``.
        fit: the norm in which the approximation is optimal.
        form: of factorized convolutions.
        targets: layers that may be replaced.
        split: pattern of a fused layer -> number of its parts.
        allocation: constraints on the ranks.
        data: batches for a fit that needs data, or a rule that measures the output. The first item of a tuple is the
            network's input; a mapping is its keyword arguments.
        loss: (output, batch) -> scalar tensor, for a fit that needs gradients.
        calibration_batches: number of batches of ``data`` to use.
        correct_batch_norm: move batch-norm statistics by what the factorization changed, measured on ``data``.
        optimizers: of the network; the factors replace the layers' weights in them.
        dry_run: only plan; the model stays as it is.

    Returns:
        The factors of every layer, and why the others stay dense.

    Raises:
        ValueError: data or a loss are needed and were not given.
        BudgetError: the budget cannot be reached.
        TargetError: the targets match nothing.
        UnsupportedError: a later method, such as quantization, works on one of the layers.

    Example:
        >>> from lightning_light.budgets import MACs
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> plan = factorize(model, torch.zeros(2, 64), MACs(0.5))
        >>> plan.before, plan.after
        (8192.0, 4096.0)
        >>> model[0]
        Factors(
          (0): Linear(in_features=64, out_features=16, bias=False)
          (1): Linear(in_features=16, out_features=64, bias=True)
        )
    """
    options = FactorizationOptions(fit, form, targets, split, allocation, calibration_batches, correct_batch_norm)
    batches, example = first_batches(data, calibration_batches), ExampleInput.of(example_inputs)
    check_request("factorize", budget, options, has_data=bool(batches))
    if fit.needs and not batches:
        raise ValueError(
            f"`factorize(fit={fit!r})`: expected `data`, batches on which the fit is made, found none. Give a "
            "DataLoader or a list of batches, or `fit=WeightSVD()`."
        )
    names = list(as_targets(targets).select(model))
    layers, reasons = find_layers(model, example, names, form=candidate_forms(form, budget), split=split or {})
    table = LatencyTable.of(budget)
    goal = goal_of(budget, model, quantity_of(budget, model, example, table), table)
    check_unowned(model, [layer.owner or layer.name for layer in layers])
    plan = plan_layers(model, layers, reasons, goal, options, loss=loss, batches=batches, example=example)
    if plan.layers and not dry_run:
        calls = [example_of_batch(batch, model) for batch in batches] if correct_batch_norm else []
        _carry_out(model, plan, calls, optimizers)
    return plan


@validated
def factorize_checkpoint(
    cls: type[nn.Module],
    path: str | Path,
    out: str | Path,
    budget: Budget | RankRule,
    *,
    example_inputs: Any = None,
    fit: Fit = FactorizationOptions.fit,
    form: Form = FactorizationOptions.form,
    targets: Targets | str | list[str] | None = FactorizationOptions.targets,
    split: dict[str, int] | None = FactorizationOptions.split,
    allocation: RankAllocation = FactorizationOptions.allocation,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    calibration_batches: PositiveInt = FactorizationOptions.calibration_batches,
    correct_batch_norm: bool = FactorizationOptions.correct_batch_norm,
    **load_options: Any,
) -> FactorizationPlan:
    """Factorize a finished checkpoint into a new one, which `lightning_light.load_from_checkpoint` opens.

    The new checkpoint holds weights, hyperparameters, epoch and step; optimizers and loops start again, because their
    states belong to the old weights.

    Args:
        cls: class of the LightningModule.
        path: the finished checkpoint, compressed or not.
        out: path of the new checkpoint.
        budget: as in `factorize`, like the other options.
        example_inputs: of one call; the module's ``example_input_array`` by default.
        fit: the norm in which the approximation is optimal.
        form: of factorized convolutions.
        targets: layers that may be replaced.
        split: pattern of a fused layer -> number of its parts.
        allocation: constraints on the ranks.
        data: batches for a fit that needs data, or a rule that measures the output.
        loss: (output, batch) -> scalar tensor, for a fit that needs gradients.
        calibration_batches: number of batches of ``data`` to use.
        correct_batch_norm: move batch-norm statistics by what the factorization changed, measured on ``data``.
        **load_options: passed to ``cls.load_from_checkpoint``.

    Raises:
        ValueError: there are no example inputs.
        LightningLightError: no layer can be factorized; nothing is written.
    """
    options = FactorizationOptions(fit, form, targets, split, allocation, calibration_batches, correct_batch_norm)
    lightning_module: Any = cls
    module = load_from_checkpoint(lightning_module, path, **load_options)
    example = _example_of(module, example_inputs)
    if not has_state(module):
        attach(module)
    plan = factorize(module, example, budget, **vars(options), data=data, loss=loss)
    if not plan.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.skipped.items())
        raise LightningLightError(
            f"`factorize_checkpoint({str(path)!r})`: expected at least one layer to factorize, found none, and wrote "
            f"nothing. {reasons}"
        )
    save_converted(module, path, out)
    return plan


def plan_layers(
    model: nn.Module,
    layers: list[FactorizableLayer],
    reasons: Mapping[str, str],
    goal: Goal,
    options: FactorizationOptions,
    *,
    gathered: Gathered | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    batches: Sequence[Any] = (),
    known_faster: Iterable[str] = (),
    example: ExampleInput | None = None,
) -> FactorizationPlan:
    """Plan with the instruments that measure on ``model``; see `Planner`. Evidence is gathered unless it is given."""
    if gathered is None and options.fit.needs and layers:
        kinds, watched = options.fit.needs, watched_modules(model, layers)
        gathered = collect_evidence(model, batches, kinds, batches=len(batches), loss=loss, layers=watched)
    evidence = {} if gathered is None else layer_evidence(model, layers, gathered)
    probe = None
    if options.measures_output(goal.budget):
        probe = OutputProbe(model, [example_of_batch(batch, model) for batch in batches])
    planner = Planner(layers, reasons, options, goal, LayerTimer(model), evidence, probe, frozenset(known_faster))
    table = goal.table
    if table is None:
        return planner.plan()
    assert example is not None
    least = require_file_reachable(model, planner, example)
    timer = FileTimer(model, table)  # by the corrected table
    planner = replace(planner, timer=timer)
    found = planner.plan()
    if goal.limit > goal.final:
        return found
    target = goal.final
    while (seconds := table.file(timer.factorized(found.entry), example)) > goal.final:
        if target <= least:
            raise unreachable(goal, goal.final, seconds, len(layers))
        target = max(lowered(target, found.after, seconds, goal.final), least)
        found = replace(planner, goal=replace(goal, limit=target, final=target)).plan()
    return replace(found, after=seconds, estimated=found.after)


def require_file_reachable(model: nn.Module, planner: Planner, example: ExampleInput) -> float:
    """Measure the file of the network with the fastest factors, which corrects the estimates.

    Returns:
        Its seconds as they are estimated afterwards; those of the network as it is where that meets the budget.

    Raises:
        BudgetError: it is slower than the budget.
    """
    goal, table = planner.goal, planner.goal.table
    assert table is not None
    if goal.current <= goal.final:
        return goal.current
    timer = FileTimer(model, table)
    copied = timer.factorized(replace(planner, timer=timer).fastest().entry)
    seconds = (table.file if table.is_corrected else table.correct_by)(copied, example)
    if seconds > goal.final:
        raise unreachable(goal, goal.final, seconds, len(planner.layers))
    return table.estimate(copied, example) * (1 + 1e-6)


def _carry_out(
    model: nn.Module, plan: FactorizationPlan, calls: Sequence[ExampleInput], optimizers: Iterable[Optimizer]
) -> None:
    """Replace layers, correct the batch-norm statistics, and record it where checkpoints keep that."""
    compression_state = attach_if_kept(model)
    before = measure_statistics(model, calls)
    entry = apply_factors(model, plan, optimizers=optimizers)
    move_statistics(model, before, measure_statistics(model, calls), {})
    if compression_state is not None:
        compression_state.record(entry)
        claimed = compression_state.claims.get(METHOD)
        layers = [*(claimed.layers if claimed else ()), *plan.layers]
        compression_state.claim(model, METHOD, Stage.FACTORS, layers)


def _example_of(module: Any, example_inputs: Any) -> ExampleInput:
    if example_inputs is None:
        example_inputs = getattr(module, "example_input_array", None)
    if example_inputs is None:
        raise ValueError(
            f"`factorize_checkpoint({type(module).__name__})`: expected `example_inputs`, found None and no "
            "`example_input_array`. Give for instance `example_inputs=torch.zeros(1, 3, 32, 32)`."
        )
    return ExampleInput.of(example_inputs).to(module)
