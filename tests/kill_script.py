"""Runs that are killed at random and started again: ``python -m tests.kill_script FOLDER COUNT SEED [WORLD]``.

Prune, distil, quantize and export, once without interruption and COUNT times killed, one to three times each, at a
random step in a random hook of a random rank, without a chance to tidy up. A run that is started again goes on from its
newest checkpoint. Prints one line of JSON: what differs at the end, the exported file included, and what the other
ranks of a killed one did. Every run is a fork of this process, which imports everything once.
"""

import copy
import functools
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_light.budgets import MACs
from lightning_light.criteria import Taylor
from lightning_light.distillation import FeatureHint, KnowledgeDistillation, SoftTargets
from lightning_light.export import MobileExport, Tolerance
from lightning_light.monitors import CompressionMonitor
from lightning_light.quantization import LSQ, Int8, MixedPrecision, QuantizationAwareTraining
from lightning_light.schedules import Linear, Window
from lightning_light.structured import GroupLasso, StructuredPruning
from lightning_light.surgery.attachment import state_of
from tests.contract.bodies import BATCHES, Body, Loader, module_class
from tests.contract.cases.distillation import HINT, MENTOR
from tests.contract.runs import differences, outcome, trainer

HOOKS = (
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_after_backward",
    "on_train_batch_end",
    "on_validation_end",
    "on_save_checkpoint",
    "on_fit_end",
)
LAST_STEP = 12
HUNG = 99
"""Exit status of a fork that did not end in time."""


@dataclass
class Kill(lightning.pytorch.Callback):
    """Ends the process as a power cut would: at a step, or later, in a hook, on one rank."""

    step: int
    hook: str
    rank: int = 0

    def __post_init__(self) -> None:
        setattr(self, self.hook, self.strike)

    def strike(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def chain(folder: Path) -> list[Any]:
    """Prune, distil, quantize, export."""
    return [
        KnowledgeDistillation(teacher=MENTOR, losses=[SoftTargets(), FeatureHint(feature_layers=HINT)]),
        StructuredPruning(
            MACs(0.5),
            criterion=Taylor(),
            calibration_batches=2,
            schedule=Window(Linear(), start=0.1, end=0.45),
            every_n_steps=2,
            regularizer=GroupLasso(0.01),
        ),
        QuantizationAwareTraining(
            MixedPrecision(default=LSQ(8, 8), first=Int8(), last=Int8()), start=0.5, calibration_batches=2
        ),
        CompressionMonitor(table=False),
        MobileExport(folder / "model.ptl", parity=Tolerance(absolute=5.0), latency_runs=1),
    ]


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step=*.ckpt"), key=_step)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def forget_end_of_epoch(folder: Path) -> None:
    """Remove the newest checkpoint if it is of the last batch of an epoch.

    A run that goes on from there is not interrupted again: Lightning 2.6 counts the epoch twice in later checkpoints,
    and trains too long from those of the next epoch, without this package as well.
    """
    saved = checkpoints(folder)
    if saved and _step(saved[-1]) % BATCHES == 0:
        saved[-1].unlink()


def fit(
    folder: Path, kill: Kill | None, world: int, *, callbacks: list[Any] | None = None, body: type[Body] = Body
) -> None:
    """Train from the newest checkpoint in ``folder``, if there is one, and store how it ends."""
    torch.manual_seed(3)
    saved = checkpoints(folder)
    module = module_class(body, lightning.pytorch)()
    rank = int(os.environ.get("RANK", "0"))
    module.train_dataloader = lambda: Loader(turn=rank)
    saving = ModelCheckpoint(folder, "step={step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1)
    parallel: dict[str, Any] = {} if world == 1 else {"strategy": DDPStrategy(process_group_backend="gloo")}
    run = trainer(*(callbacks or chain(folder)), saving, *([kill] if kill else []), devices=world, **parallel)
    run.fit(module, ckpt_path=saved[-1] if saved else None)
    if rank == 0:
        state = state_of(module)
        metrics = {name: float(value) for name, value in sorted(run.callback_metrics.items())}
        end = {**outcome(run, module), "metrics": metrics, "losses": module.losses, "state": state.state}
        torch.save({**end, "edit_log": state.edit_log}, folder / "end.pt")


def forked(world: int, folder: Path, function: Callable[[], None]) -> list[int]:
    """Run ``function`` in ``world`` forks; returns the exit status of each, negative for a signal, or `HUNG`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _run_child(rank, world, port, folder, function)
        children.append(child)
    return [_wait(child) for child in children]


def _run_child(rank: int, world: int, port: int, folder: Path, function: Callable[[], None]) -> None:
    if world > 1:  # as torchrun does
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="kills")
    try:
        function()
    except BaseException as error:  # noqa: BLE001  # the parent reads the status and the message
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


def _wait(child: int, seconds: float = 300.0) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return HUNG


def end_of(folder: Path) -> dict[str, Any]:
    end: dict[str, Any] = torch.load(folder / "end.pt", weights_only=True)
    return {**end, "file": list((folder / "model.ptl").read_bytes())}


def trial(folder: Path, whole: dict[str, Any], rng: random.Random, world: int) -> dict[str, Any]:
    """Kill one run at several random places, finish it, and compare it with the one that was not interrupted."""
    folder.mkdir()
    kills = [Kill(step, rng.choice(HOOKS), rng.randrange(world)) for step in _steps(rng)]
    statuses = []
    for kill in kills:
        forget_end_of_epoch(folder)
        statuses.append(forked(world, folder, functools.partial(fit, folder, kill, world)))
    hung = [status for status in statuses if HUNG in status]
    messages = [path.read_text().splitlines()[0] for path in folder.glob("error-*.txt")]
    final = forked(world, folder, lambda: fit(folder, None, world))
    if any(final):
        errors = [path.read_text()[-1500:] for path in folder.glob("error-*.txt")]
        return {"kills": str(kills), "differs": [f"ended with {final}: {errors}"], "hung": hung}
    differs = differing(whole, end_of(folder))
    killed = sum(-signal.SIGKILL in status for status in statuses)
    return {"kills": str(kills), "killed": killed, "differs": differs[:5], "hung": hung, "messages": messages}


def differing(whole: dict[str, Any], end: dict[str, Any]) -> list[str]:
    """What an interrupted run ends with that the whole one does not."""
    whole, later = copy.deepcopy(whole), end.pop("losses")
    losses = whole.pop("losses")
    if not later:  # started again after its last step, Lightning validates no more, and counts one step less
        for run in (whole, end):
            run["metrics"] = None
            run["state"].get("compression_monitor", {"history": {}})["history"]["end"] = None
    return differences(whole, end) + ["losses"] * (later != losses[len(losses) - len(later) :])


def _steps(rng: random.Random) -> list[int]:
    return sorted(rng.sample(range(LAST_STEP + 1), rng.choice([1, 1, 2, 3])))


def main(folder: Path, count: int, seed: int, world: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = random.Random(seed)
    (folder / "whole").mkdir(parents=True)
    status = forked(world, folder / "whole", lambda: fit(folder / "whole", None, world))
    if any(status):
        raise SystemExit("\n".join(path.read_text() for path in (folder / "whole").glob("error-*.txt")))
    whole = end_of(folder / "whole")
    trials = [trial(folder / str(number), whole, rng, world) for number in range(count)]
    found = {
        "trials": count,
        "kills": sum(one.get("killed", 0) for one in trials),
        "wrong": [one for one in trials if one["differs"] or one["hung"]],
        "messages": sorted({message[:160] for one in trials for message in one.get("messages", [])}),
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 1)
