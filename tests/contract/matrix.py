"""Methods in every combination of two settings: ``python -m tests.contract.matrix FOLDER [COUNT [SEED]]``.

A seeded covering array of strength two over `FACTORS`, of rows that Lightning itself supports; COUNT rows of it, all by
default. Every row is a fit in forks of
this process, some of them resumed. A row works, is refused by a sentence of this package, or fails
without a method too, with the same settings; anything else is printed. Ends with one line of JSON.
"""

import itertools
import json
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_light.surgery.distributed import digest
from tests.contract.bodies import Body, FrozenBackbone, Lazy, Loader, MadeLate, Momentum, Tied, TwoOptimizers
from tests.contract.case import Case
from tests.contract.runs import checkpoints, differences, outcome, trainer
from tests.contract.table import CASES
from tests.kill_script import HUNG, forked

REFUSED, FOREIGN = "refused", "foreign"


class Uneven(Loader):
    """The last batch is smaller, and other ranks have others."""

    def __init__(self, rank: int) -> None:
        super().__init__(turn=rank)
        images, labels = self.batches[-1]
        self.batches[-1] = (images[: 3 + rank], labels[: 3 + rank])


BODIES: dict[str, type[Body]] = {"plain": Body, "frozen": FrozenBackbone, "tied": Tied, "late": MadeLate, "lazy": Lazy}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "two by hand": None,
}
PRECISIONS: dict[str, Any] = {
    "float": dict,
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]},
    "double": lambda: {"precision": "64-true"},
}
BESIDE: dict[str, Any] = {
    "nothing": list,
    "ema": lambda: [EMAWeightAveraging(decay=0.9)],
    "swa": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)],
    "early stopping": lambda: [EarlyStopping("val_loss", patience=5)],
    "lr finder": lambda: [LearningRateFinder(num_training_steps=3, early_stop_threshold=None, update_attr=False)],
    "batch size finder": lambda: [BatchSizeFinder(max_trials=1, steps_per_trial=1)],
}
LENGTHS: dict[str, dict[str, Any]] = {
    "epochs": {},
    "fast_dev_run": {"fast_dev_run": True},
    "limit": {"limit_train_batches": 3, "max_epochs": 4},
    "steps": {"max_epochs": -1, "max_steps": 10},
    "second fit": {},
}
METHODS = {case.name: case for case in CASES if case.full}
FACTORS: dict[str, list[Any]] = {
    "method": list(METHODS),
    "body": list(BODIES),
    "optimizer": list(OPTIMIZERS),
    "precision": list(PRECISIONS),
    "accumulate": [1, 2, 3],
    "clip": ["none", "norm", "value"],
    "beside": list(BESIDE),
    "scheduler": ["step", "plateau"],
    "compile": ["none", "in place", "wrapped"],
    "length": list(LENGTHS),
    "processes": [1, 1, 2, 3],
    "order": ["before", "after"],
}
Row = dict[str, Any]


def is_supported(row: Row) -> bool:
    """Whether the row runs without a method; a value that a row lacks excludes nothing."""
    body, beside, length = row.get("body"), row.get("beside"), row.get("length")
    by_hand, clips = row.get("optimizer") == "two by hand", row.get("clip") in ("norm", "value")
    mixed, ranks = row.get("precision") in ("bf16", "fp16"), row.get("processes", 1)
    case = METHODS.get(row.get("method", ""))
    return not (
        (ranks > 1 and (body == "lazy" or beside == "batch size finder"))  # DDP and the finder refuse it
        or (body == "lazy" and beside in ("ema", "swa", "lr finder", "batch size finder"))  # copied or saved before
        or (row.get("optimizer") == "fused" and mixed and clips)  # Lightning refuses it
        or (by_hand and beside in ("swa", "lr finder"))  # they take one optimizer
        or (
            beside == "swa" and row.get("clip") == "value" and not by_hand
        )  # torch stops at the epoch without gradients
        or (case is not None and case.body not in (Body, Momentum) and body in ("tied", "frozen"))  # other layers
        or (beside == "early stopping" and length == "limit")  # resumed, there is no value to compare yet
    )


def covering_array(
    factors: dict[str, list[Any]], rng: random.Random, supported: Callable[[Row], bool] = is_supported
) -> list[Row]:
    """Rows such that every two values of different factors that are supported occur together in one of them."""
    values = {name: list(dict.fromkeys(options)) for name, options in factors.items()}
    pairs = (((a, x), (b, y)) for a, b in itertools.combinations(values, 2) for x in values[a] for y in values[b])
    missing = {pair for pair in pairs if supported(dict(pair))}
    rows: list[Row] = []
    while missing:
        candidates: list[Row] = []
        while len(candidates) < 20:
            seed = dict(rng.choice(sorted(missing, key=repr)))
            row = {name: seed.get(name, rng.choice(options)) for name, options in factors.items()}
            candidates += [row] if supported(row) else []
        rows.append(max(candidates, key=lambda row: sum(pair in missing for pair in _pairs(row))))
        missing -= _pairs(rows[-1])
    return rows


def _pairs(row: Row) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(row.items(), 2))


def module_of(row: Row) -> Any:
    """The module of a row: its layers, its optimizers, its compiled part."""
    by_hand = row["optimizer"] == "two by hand"
    body, layers = BODIES[row["body"]], METHODS[row["method"]].body
    bodies = (layers,) if issubclass(layers, body) else (body, layers) if layers is not Body else (body,)

    class Module(*((TwoOptimizers,) if by_hand else ()), *bodies, lightning.pytorch.LightningModule):  # type: ignore[misc]
        batch_size = 8

        def make(self) -> None:
            super().make()
            if row["compile"] == "in place" and self.features is not None:
                self.features.compile(backend="eager")

        def configure_model(self) -> None:
            if hasattr(body, "configure_model"):
                body.configure_model(self)
            if row["compile"] == "wrapped" and not hasattr(self.features, "_orig_mod"):
                self.features = torch.compile(self.features, backend="eager")

        def loss(self, batch: Any) -> Tensor:
            dtype = next(self.features.parameters()).dtype
            loss = F.cross_entropy(self(batch[0].to(dtype)), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            if by_hand:
                return TwoOptimizers.configure_optimizers(self)
            learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
            optimizer = OPTIMIZERS[row["optimizer"]](learning)
            if row["scheduler"] == "plateau":
                plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}

    return Module()


def options_of(row: Row) -> dict[str, Any]:
    """New options for one Trainer."""
    options = {**PRECISIONS[row["precision"]](), **LENGTHS[row["length"]], "devices": row["processes"]}
    if row["optimizer"] != "two by hand":  # Lightning leaves both to the module
        options["accumulate_grad_batches"] = row["accumulate"]
        if row["clip"] != "none":
            options |= {"gradient_clip_val": 0.5, "gradient_clip_algorithm": row["clip"]}
    if row["processes"] > 1:
        options["strategy"] = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    return options


def fit(row: Row, case: Case | None, folder: Path, resume: Path | None = None) -> tuple[Any, Any]:
    """One run of a row, with the method or without."""
    torch.manual_seed(3)
    module, rank = module_of(row), int(os.environ.get("RANK", "0"))
    module.train_dataloader = lambda: Uneven(rank)
    methods, beside = case.build(folder) if case else [], BESIDE[row["beside"]]()
    callbacks = [*beside, *methods] if row["order"] == "before" else [*methods, *beside]
    saving = checkpoints(folder) if resume is None else []
    run = trainer(*callbacks, *saving, **options_of(row))
    run.fit(module, ckpt_path=resume)
    if row["length"] == "second fit":
        trainer(*callbacks, **options_of(row)).fit(module)
    return run, module


def examine(row: Row, case: Case | None, folder: Path) -> None:
    """Fit; then compare ranks, and a resumed run with the whole one."""
    rank = os.environ.get("RANK", "0")
    run, module = fit(row, case, folder)
    if not torch.tensor(module.losses).isfinite().all():
        raise ArithmeticError(f"losses {module.losses}")
    end = outcome(run, module)
    (folder / f"end-{rank}").write_text(digest(dict(module.named_parameters())))
    middle = folder / f"step={run.global_step // 2}.ckpt"
    resumes = row["length"] in ("epochs", "limit", "steps") and row["processes"] == 1 and row["order"] == "before"
    resumes &= row["precision"] != "double" or row["body"] == "late"  # else loaded as float
    if resumes and middle.exists() and row["beside"] in ("nothing", "ema", "early stopping"):
        different = differences(end, outcome(*fit(row, case, folder / "again", middle)))
        if different:
            raise ArithmeticError(f"resumed from {middle.name}: {different[:3]}")


def result(row: Row, case: Case | None, folder: Path) -> str:
    """``works``, or what stopped the row."""
    folder.mkdir(parents=True, exist_ok=True)
    statuses = forked(row["processes"], folder, lambda: examine(row, case, folder))
    if HUNG in statuses:
        return f"{FOREIGN}: a rank did not end in time: {statuses}"
    if any(statuses):
        errors = [path.read_text() for path in sorted(folder.glob("error-*.txt"))]
        ours = [error for error in errors if "lightning_light.errors" in error.splitlines()[-1]]
        found = (ours or [error for error in errors if "closed by peer" not in error] or errors or [str(statuses)])[0]
        lines = [line.strip() for line in found.splitlines() if "lightning_light/" in line]
        return f"{REFUSED if ours else FOREIGN}: {found.splitlines()[0][:300]} {lines[-1:]}"
    ends = {path.read_text() for path in folder.glob("end-*")}
    return "works" if len(ends) == 1 else f"{FOREIGN}: the ranks differ"


def main(folder: Path, count: int | None, seed: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = random.Random(seed)
    rows = covering_array(FACTORS, rng)
    rng.shuffle(rows)
    outcomes: Counter[str] = Counter()
    wrong = []
    for number, row in enumerate(rows[:count]):
        case = METHODS[row["method"]]
        found = result(row, case, folder / str(number))
        kind = found.partition(":")[0]
        if kind == FOREIGN and result(row, None, folder / f"{number}-without") != "works":
            kind = "fails without a method too"
        outcomes[kind] += 1
        if kind == FOREIGN:
            wrong.append(f"{row}: {found}")
        if kind in (FOREIGN, REFUSED):
            print(f"{kind} {row}: {found}", flush=True)  # noqa: T201
    print(json.dumps({"rows": len(rows), "outcomes": outcomes, "wrong": wrong}))  # noqa: T201


if __name__ == "__main__":
    arguments = sys.argv[2:]
    main(Path(sys.argv[1]), int(arguments[0]) if arguments else None, int(arguments[1]) if arguments[1:] else 0)
