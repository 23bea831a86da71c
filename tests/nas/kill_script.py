"""Searches that are killed in each phase and started again: ``python -m tests.nas.kill_script FOLDER``.

`ArchitectureSearch` in a run with gradual changes, and `lightning_light.search`, once without interruption and once
killed in each phase: while the table is filled, while whole networks are compared, and between two changes. Prints one
line of JSON: for each, how the killed process ended, and what differs at the end.
"""

import functools
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from torch import Tensor

import lightning_light as ll
from lightning_light.nas import BlockChoices, ChannelChoices, RankChoices
from lightning_light.schedules import Linear, Window
from lightning_light.surgery.attachment import state_of
from tests import kill_script
from tests.contract.bodies import module_class
from tests.contract.cases.depth import Deep
from tests.contract.runs import differences
from tests.kill_script import Kill, forget_end_of_epoch, forked

SPACE = [BlockChoices("features.1"), ChannelChoices((0.5,)), RankChoices((0.5,), targets="features.2")]
OPTIONS: dict[str, Any] = {"space": SPACE, "calibration_batches": 1, "evaluation_batches": 1, "evaluations": 2}
COMPARED = 4  # forward passes of whole networks before the kill


class Killed(Deep):
    """Ends the process as a power cut would, in a forward pass at which ``due`` is true."""

    due: Callable[[], bool] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if Killed.due is not None and Killed.due():
            os.kill(os.getpid(), signal.SIGKILL)
        out: Tensor = super().forward(x)
        return out


@dataclass
class BetweenChanges(Kill):
    """Ends the process after the first change, before the last."""

    def strike(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = state_of(pl_module).state["architecture_search"]
        if 0 < len(state.get("pending", [])) < state["count"]:
            super().strike(trainer)


def in_table(path: Path) -> Callable[[], bool]:
    """Become true when two entries are on disk."""
    return lambda: _entries(path) == 2


def in_networks(path: Path, items: int) -> Callable[[], bool]:
    """Become true some forward passes after the table is full."""
    calls: list[int] = []

    def due() -> bool:
        calls.extend([1] * (_entries(path) == items))
        return len(calls) == COMPARED

    return due


def _entries(path: Path) -> int:
    return len(json.loads(path.read_text())["distances"]) if path.exists() else 0


def fit(folder: Path, kill: Kill | None = None, due: Callable[[], bool] | None = None) -> None:
    """Train from the newest checkpoint in ``folder``, with a search at a third of the run."""
    Killed.due = due
    method = ll.ArchitectureSearch(
        [ll.MACs(0.45), ll.Size("16 kB")],
        schedule=Window(Linear(), start=0.3, end=0.8),
        table=folder / "table.json",
        **OPTIONS,
    )
    kill_script.fit(folder, kill, 1, callbacks=[method], body=Killed)


def search(folder: Path, due: Callable[[], bool] | None = None) -> None:
    """Search without a Trainer, and store the network."""
    Killed.due = due
    torch.manual_seed(3)
    net = module_class(Killed, lightning.pytorch)().eval()
    x = torch.randn(4, 8, 3, 8, 8)
    result = ll.search(net, x[0], ll.MACs(0.45), data=list(x), table=folder / "table.json", **OPTIONS)
    torch.save({"items": result.lines(), "weights": net.state_dict()}, folder / "end.pt")


def trial(folder: Path, whole: Path, run: Callable[..., None], **kill: Any) -> dict[str, Any]:
    """Kill one process, start it again, and compare what it leaves with that of the one that was not interrupted."""
    folder.mkdir()
    (status,) = forked(1, folder, functools.partial(run, folder, **kill))
    forget_end_of_epoch(folder)
    (again,) = forked(1, folder, functools.partial(run, folder))
    if again:
        return {"status": status, "differs": [(folder / "error-0.txt").read_text()[-1500:]]}
    ends = [torch.load(path / "end.pt", weights_only=True) for path in (whole, folder)]
    differs = kill_script.differing(*ends) if run is fit else differences(*ends)
    return {"status": status, "differs": differs[:5]}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for name, run in (("fit", fit), ("search", search)):
        whole = folder / name
        whole.mkdir(parents=True)
        if any(forked(1, whole, functools.partial(run, whole))):
            raise SystemExit((whole / "error-0.txt").read_text())
        items = _entries(whole / "table.json")
        phases: dict[str, dict[str, Any]] = {"table": {}, "networks": {}}
        if run is fit:
            phases |= {"change": {"kill": BetweenChanges(8, "on_train_batch_end")}}
        for phase, kill in phases.items():
            path = folder / f"{name}-{phase}"
            dues = {"table": in_table(path / "table.json"), "networks": in_networks(path / "table.json", items)}
            if phase in dues:
                kill["due"] = dues[phase]
            found[path.name] = trial(path, whole, run, **kill)
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
