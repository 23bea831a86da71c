"""Convert a finished checkpoint: ``python -m lightning_light.lowrank package.module:MyModule in.ckpt out.ckpt``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lightning_light.budgets import MACs, Params
from lightning_light.errors import LightningLightError
from lightning_light.lowrank.functional import factorize_checkpoint
from lightning_light.lowrank.low_rank_factorization import LowRankFactorization
from lightning_light.lowrank.ranks import EVBMF, EnergyKept, RankRatio

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, convert, print what each layer has become."""
    parser = argparse.ArgumentParser("python -m lightning_light.lowrank", description=__doc__)
    parser.add_argument("module", help="the LightningModule's class, as package.module:MyModule")
    parser.add_argument("checkpoint", help="a finished checkpoint")
    parser.add_argument("out", help="where the new checkpoint goes")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--macs", type=float, help="share of the multiply-accumulates that stays")
    what.add_argument("--params", type=float, help="share of the parameters that stays")
    what.add_argument("--energy", type=float, help="share of each layer's energy that is kept")
    what.add_argument("--ratio", type=float, help="share of each layer's full rank")
    what.add_argument("--evbmf", action="store_true", help="ranks that stand out from noise")
    parser.add_argument("--form", choices=["auto", "channel", "spatial", "tucker2"], default="auto")
    parser.add_argument("--round_to", type=int, default=8)
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
            factorization=LowRankFactorization(
                **_what(given), form=given.form, round_to=given.round_to, targets=given.targets
            ),
            args=None if given.input is None else (torch.zeros(given.input),),
        )
    except (LightningLightError, ValueError, ImportError, AttributeError, OSError) as error:
        parser.error(str(error))
    lines = [*plan.lines(), f"{plan.quantity}: {plan.before:.6g} -> {plan.after:.6g}", f"written: {given.out}"]
    sys.stdout.write("\n".join(lines) + "\n")


def _what(given: argparse.Namespace) -> dict[str, Any]:
    if given.macs is not None:
        return {"budget": MACs(given.macs)}
    if given.params is not None:
        return {"budget": Params(given.params)}
    if given.energy is not None:
        return {"ranks": EnergyKept(given.energy)}
    return {"ranks": EVBMF() if given.evbmf else RankRatio(given.ratio)}


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
