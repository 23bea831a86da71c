"""Train LightningModules in the manner of published projects with every method: does the run work, resume and load?

    python benchmarks/projects.py results.jsonl [--projects T5 ...] [--columns prune ...]
    python benchmarks/projects.py results.jsonl --table

The modules are those of ``tests/projects.py`` and ``tests/language_projects.py``. A method is trained for two epochs;
the run is then resumed from the end of the first, has to end with equal weights, optimizers and counters to the last
bit, and its last checkpoint has to load without a Trainer. The exports are written at the end of a run, from its own
batches, and have to pass the comparison with the module in their runtime. A cell works; is refused by an error of this
package before the first step; or has failed in any other way, a warning that nothing had an effect included. Where a
refusal names an argument that the module needs, that is given: see ``DISTILLED`` and ``EXPORTED``.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from zoo import stored

import lightning_light as ll
from lightning_light.errors import LightningLightError, NoEffectWarning
from lightning_light.schedules import OneShot
from tests.contract.runs import checkpoints, differences, outcome, trainer
from tests.language_projects import LANGUAGE_PROJECTS
from tests.projects import PROJECTS, Board
from tests.structured.test_projects import GOALS

PROJECT_KINDS: dict[str, Any] = {**PROJECTS, **LANGUAGE_PROJECTS}
HALF = OneShot(at=0.5)
METHODS: dict[str, Callable[[str], Any]] = {
    "prune": lambda name: ll.StructuredPruning(ll.Params(GOALS.get(name, 0.7)), schedule=HALF),
    "mask": lambda name: ll.WeightPruning(ll.Sparsity(0.7), schedule=HALF),
    "quantize": lambda name: ll.QuantizationAwareTraining(ll.Int8(), start=0.3, calibration_batches=1),
    "factor": lambda name: ll.LowRankFactorization(ll.Params(0.9), schedule=HALF),
    "cluster": lambda name: ll.WeightClustering(8, start=0.3),
    "distil": lambda name: distillation(name),
}
DISTILLED: dict[str, dict[str, Any]] = {
    "segmentation": {"student": "model"},
    "variational autoencoder": {"student": "encoder"},
    "graph network": {"student": "first"},
    "forecaster": {"student": "model", "output": "mean", "teacher_output": "mean"},
    **{name: {"output": "logits", "teacher_output": "logits"} for name in LANGUAGE_PROJECTS},
}
EXPORTED: dict[str, dict[str, Any]] = {"segmentation": {"module": "model"}, "graph network": {"batch": "as_given"}}
FILES = {"TorchScript": "model.ptl", "ONNX": "model.onnx", "ExecuTorch": "model.pte"}


def distillation(name: str) -> Any:
    options = DISTILLED.get(name, {})
    teacher = PROJECT_KINDS[name]().eval().get_submodule(options.get("student", ""))
    return ll.KnowledgeDistillation(teacher=teacher, **options)


def trained(name: str, column: str, folder: Path) -> str:
    """Train with a method, resume, and load."""
    kind, make = PROJECT_KINDS[name], METHODS[column]
    module, resumed = kind(), kind()
    whole = trainer(make(name), checkpoints(folder)[1], max_epochs=2, logger=Board())
    fit(whole, module)
    again = trainer(make(name), max_epochs=2, logger=Board())
    again.fit(resumed, ckpt_path=folder / "epoch=0.ckpt")
    assert not (found := differences(outcome(whole, module), outcome(again, resumed))), f"resumed: {found[:3]}"
    loaded = ll.load_from_checkpoint(kind, folder / "epoch=1.ckpt")
    assert not (found := differences(dict(module.state_dict()), dict(loaded.state_dict()))), f"loaded: {found[:3]}"
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values()), "not finite"
    return f"{sum(parameter.numel() for parameter in module.parameters())} parameters"


def exported(name: str, column: str, folder: Path) -> str:
    """Train, and write a file at the end."""
    export = ll.MobileExport(folder / FILES[column], latency_runs=1, **EXPORTED.get(name, {}))
    fit(trainer(export, max_epochs=1, logger=Board()), PROJECT_KINDS[name]())
    return f"{(folder / FILES[column]).stat().st_size} bytes"


class EarlyError(Exception):
    """An error of this package before the first step."""


def fit(run: Any, module: Any) -> None:
    try:
        run.fit(module)
    except (LightningLightError, ValueError, TypeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        if run.global_step or "lightning_light" not in place.filename:
            raise
        raise EarlyError(f"{type(error).__name__}: {error}") from error


def cell(name: str, column: str) -> dict[str, Any]:
    """Run one method on one module: works, refused or failed."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", NoEffectWarning)
        try:
            detail = (trained if column in METHODS else exported)(name, column, Path(folder))
            result = {"outcome": "works", "detail": detail}
        except EarlyError as error:
            result = {"outcome": "refused", "detail": str(error)}
        except Exception as error:  # noqa: BLE001 - any error of a run is a result
            place = traceback.extract_tb(error.__traceback__)[-1]
            result = {"outcome": "failed", "detail": f"{type(error).__name__}: {error} ({place.name}:{place.lineno})"}
    return {"network": name, "column": column, **result, "seconds": time.process_time() - started}


def table(results: Sequence[dict[str, Any]]) -> str:
    """One row per module, then what does not work."""
    columns, cells = [*METHODS, *FILES], {(one["network"], one["column"]): one for one in results}
    lines = ["| module | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in PROJECT_KINDS:
        lines.append(f"| {name} | " + " | ".join(cells.get((name, c), {}).get("outcome", "") for c in columns) + " |")
    lines += ["", "| module | column | outcome | reason |", "|---|---|---|---|"]
    for one in results:
        if one["outcome"] != "works":
            detail = " ".join(one["detail"].split())[:300].replace("|", "\\|")
            lines.append(f"| {one['network']} | {one['column']} | {one['outcome']} | {detail} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--projects", nargs="*", default=list(PROJECT_KINDS), choices=list(PROJECT_KINDS))
    parser.add_argument("--columns", nargs="*", default=[*METHODS, *FILES], choices=[*METHODS, *FILES])
    parser.add_argument("--table", action="store_true", help="print what is stored, and run nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for column in given.columns if not given.table else ():
        for name in given.projects:
            if stored(given.results).get((name, column), {}).get("outcome") != "works":
                result = cell(name, column)
                with given.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{name}, {column}: {result['outcome']}, {result['detail']}"[:240], flush=True)
    print(table(list(stored(given.results).values())))


if __name__ == "__main__":
    main()
