"""Factorize a finished checkpoint: ``python -m lightning_light.lowrank package.module:MyModule in.ckpt out.ckpt``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lightning_light.budgets import Budget, MACs, Params
from lightning_light.errors import LightningLightError
from lightning_light.lowrank.functional import factorize_checkpoint
from lightning_light.lowrank.options import FactorizationOptions, RankAllocation
from lightning_light.lowrank.ranks import EVBMF, RankRatio, RankRule, RetainedEnergy

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, factorize the checkpoint, and print the plan."""
    parser = argparse.ArgumentParser("python -m lightning_light.lowrank", description=__doc__)
    parser.add_argument("module", help="class of the LightningModule, as package.module:MyModule")
    parser.add_argument("checkpoint", help="a finished checkpoint")
    parser.add_argument("out", help="path of the new checkpoint")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--macs", type=float, help="fraction of the multiply-accumulates that stays")
    goal.add_argument("--params", type=float, help="fraction of the parameters that stays")
    goal.add_argument("--energy", type=float, help="fraction of each layer's energy that is retained")
    goal.add_argument("--ratio", type=float, help="fraction of each layer's full rank")
    goal.add_argument("--evbmf", action="store_true", help="ranks above the noise level of each layer")
    parser.add_argument("--form", choices=["auto", "channel", "spatial", "tucker2"], default=FactorizationOptions.form)
    parser.add_argument("--round_to", type=int, default=RankAllocation.round_to)
    parser.add_argument("--targets", nargs="+", help="patterns of layers; all by default")
    parser.add_argument(
        "--input", type=_shape, help="shape of one batch, as 1,3,32,32; `example_input_array` by default"
    )
    given = parser.parse_args(arguments)
    try:
        plan = factorize_checkpoint(
            _class(given.module),
            given.checkpoint,
            given.out,
            _budget(given),
            example_inputs=None if given.input is None else torch.zeros(given.input),
            form=given.form,
            targets=given.targets,
            allocation=RankAllocation(round_to=given.round_to),
        )
    except (LightningLightError, ValueError, ImportError, AttributeError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write("\n".join([*plan.lines(), plan.summary(), f"written: {given.out}"]) + "\n")


def _budget(given: argparse.Namespace) -> Budget | RankRule:
    if given.macs is not None:
        return MACs(given.macs)
    if given.params is not None:
        return Params(given.params)
    if given.energy is not None:
        return RetainedEnergy(given.energy)
    return EVBMF() if given.evbmf else RankRatio(given.ratio)


def _class(path: str) -> Any:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


if __name__ == "__main__":
    main()
