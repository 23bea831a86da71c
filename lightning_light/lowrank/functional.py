"""Factor a network, or a finished checkpoint, outside a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_light.errors import LightningLightError
from lightning_light.example_input import ExampleInput
from lightning_light.lowrank.apply import apply_factors
from lightning_light.lowrank.costs import quantity
from lightning_light.lowrank.evidence import calibration_calls, from_batches
from lightning_light.lowrank.layers import find_layers
from lightning_light.lowrank.low_rank_factorization import LowRankFactorization
from lightning_light.lowrank.plan import Plan
from lightning_light.surgery.attachment import attach, has_state, release
from lightning_light.surgery.checkpoint import load_from_checkpoint
from lightning_light.surgery.manifest import KEY
from lightning_light.targets import as_targets

__all__ = ["factorize", "factorize_checkpoint"]

_KEPT = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "hparams_name",
    "hyper_parameters",
    "hparams_type",
    "datamodule_hparams_name",
    "datamodule_hyper_parameters",
)


def factorize(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    factorization: LowRankFactorization,
    optimizers: Iterable[Optimizer] = (),
) -> Plan:
    """Replace layers of ``model`` by factors in one go, in place, as the callback would at its last event.

    Args:
        model: any module. A LightningModule's later checkpoints know what has been done.
        args: positional arguments of one call.
        kwargs: keyword arguments of that call.
        factorization: says what to reach and how; when does not count. A fit that needs data, or a rule that measures
            the output, takes them from its ``calibration``.
        optimizers: which get the factors in the place of the layers' weights.

    Returns:
        What each layer has become, and why the others stayed.

    Raises:
        ValueError: data are needed and ``calibration`` is None, or gradients are, which only training has.
        BudgetError: the budget cannot be reached.
        TargetError: the targets name nothing.

    Example:
        >>> from lightning_light.budgets import MACs
        >>> from lightning_light.lowrank import LowRankFactorization
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> plan = factorize(model, (torch.zeros(2, 64),), factorization=LowRankFactorization(MACs(0.5)))
        >>> plan.before, plan.after
        (8192.0, 4096.0)
        >>> model[0]
        Sequential(
          (0): Linear(in_features=64, out_features=16, bias=False)
          (1): Linear(in_features=16, out_features=64, bias=True)
        )
    """
    _check_data(factorization)
    example = ExampleInput(args, dict(kwargs or {}))
    names = list(as_targets(factorization.targets).select(model))
    layers, reasons = find_layers(model, example, names, form=factorization.form, blocks=factorization.blocks or {})
    calls = calibration_calls(model, factorization.calibration, factorization.calibration_batches)
    needs = factorization.fit.needs
    evidence = from_batches(model, layers, needs, calls) if needs else {}
    dense = quantity(model, factorization.budget, example)
    limit = 0.0 if factorization.budget is None else factorization.budget.goal(dense)
    plan = factorization.plan(model, layers, reasons, now=dense, limit=limit, evidence=evidence, calls=calls)
    if plan.layers and not factorization.dry_run:
        compression_state = attach(model) if _is_lightning(model) or has_state(model) else None
        entry = apply_factors(model, plan, optimizers=optimizers)
        if compression_state is not None:
            compression_state.record(entry)
    return plan


def factorize_checkpoint(
    cls: type[Any],
    path: str | Path,
    out: str | Path,
    *,
    factorization: LowRankFactorization,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """Write a factored checkpoint of a finished one: `lightning_light.load_from_checkpoint` opens it.

    It holds weights, hyper-parameters, epoch and step; optimizers and loops start anew, as their states belong to
    weights that are gone.

    Args:
        cls: the LightningModule's class.
        path: the finished checkpoint, compressed or not.
        out: where the new one is written.
        factorization: as for `factorize`.
        args: positional arguments of one call; the module's ``example_input_array`` by default.
        kwargs: keyword arguments of that call.
        **options: passed on to ``cls.load_from_checkpoint``.

    Raises:
        ValueError: there is no example of a call.
        LightningLightError: nothing could be factored; nothing is written.
    """
    module = load_from_checkpoint(cls, path, **options)
    example = _example(module, args, kwargs)
    old = torch.load(path, map_location="cpu", weights_only=True)
    if not has_state(module):
        attach(module)
    plan = factorize(module, example.args, example.kwargs, factorization=factorization)
    if not plan.layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in plan.skipped.items())
        raise LightningLightError(
            f"`factorize_checkpoint({str(path)!r})`: expected at least one layer to factor, found none, and wrote "
            f"nothing. {reasons}"
        )
    new = {key: old[key] for key in _KEPT if key in old}
    new["state_dict"] = module.state_dict()
    new[KEY] = attach(module).manifest(module)
    release(module)
    torch.save(new, out)
    return plan


def _example(module: Any, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None) -> ExampleInput:
    if args is not None or kwargs is not None:
        return ExampleInput(args or (), dict(kwargs or {})).to(module)
    array = getattr(module, "example_input_array", None)
    if array is None:
        raise ValueError(
            f"`factorize_checkpoint({type(module).__name__})`: expected an example of a call, found no `args` and no "
            "`example_input_array`. Give for instance `args=(torch.zeros(1, 3, 32, 32),)`."
        )
    return ExampleInput.from_array(array).to(module)


def _check_data(factorization: LowRankFactorization) -> None:
    if "grad_squared" in factorization.fit.needs:
        raise ValueError(
            f"`factorize(factorization={factorization!r})`: expected a fit that gradients have no part in, which only "
            "training has. Use the callback in a Trainer, or `fit=WhitenedSVD()`."
        )
    if factorization.fit.needs and factorization.calibration is None:
        raise ValueError(
            f"`factorize(factorization={factorization!r})`: expected `calibration`, batches that the fit can be made "
            "on, found None. Give a DataLoader or a list of batches, or `fit=WeightSVD()`."
        )


def _is_lightning(model: nn.Module) -> bool:
    return hasattr(model, "on_save_checkpoint") and hasattr(model, "training_step")
