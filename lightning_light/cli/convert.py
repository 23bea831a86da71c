"""Factorize a finished checkpoint, or merge its branches."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_light.budgets import Budget, MACs, Params
from lightning_light.cli.errors import CommandError, as_command_error, expecting
from lightning_light.cli.modules import example_of, import_class, load_module, working
from lightning_light.lowrank import EVBMF, RankRatio, RankRule, RetainedEnergy, factorize_checkpoint
from lightning_light.lowrank.options import FactorizationOptions, Form, RankAllocation
from lightning_light.reparameterization.functional import merge_checkpoint

__all__ = ["convert"]


def convert(
    checkpoint: str,
    to: str,
    module: str,
    macs: float | None,
    params: float | None,
    energy: float | None,
    ratio: float | None,
    evbmf: bool,
    merge: bool,
    form: Form | None,
    round_to: int | None,
    targets: Sequence[str] | None,
    example: Sequence[str] | None,
) -> None:
    """Write a checkpoint of low-rank factors or of merged branches, and print what was done."""
    given = {MACs: macs, Params: params, RetainedEnergy: energy, RankRatio: ratio}
    with as_command_error():
        goals: list[Budget | RankRule] = [kind(value) for kind, value in given.items() if value is not None]
    goals += [EVBMF()] if evbmf else []
    if len(goals) + merge != 1:
        raise CommandError(
            "`convert`: expected one of --macs, --params, --energy, --ratio, --evbmf and --merge, found "
            f"{len(goals) + merge}."
        )
    if merge:
        options = {"--form": form, "--round_to": round_to, "--targets": targets, "--example": example}
        if unused := [name for name, value in options.items() if value is not None]:
            raise CommandError(f"`convert --merge`: expected no {unused[0]}, an option of low rank. Leave it out.")
        with expecting(checkpoint, "branches to merge"), working(f"merging {checkpoint}"):
            merging = merge_checkpoint(import_class(module), checkpoint, to)
        sys.stdout.write(f"{merging}\nwritten: {to}\n")
        return
    call = example_of(load_module(checkpoint, module), checkpoint, example)
    with expecting(checkpoint, "layers to factorize"), working(f"factorizing {checkpoint}"):
        plan = factorize_checkpoint(
            import_class(module),
            checkpoint,
            to,
            goals[0],
            example_inputs=call,
            form=form or FactorizationOptions.form,
            targets=None if targets is None else list(targets),
            allocation=RankAllocation() if round_to is None else RankAllocation(round_to=round_to),
        )
    sys.stdout.write("\n".join([*plan.lines(), plan.summary(), f"written: {to}"]) + "\n")
