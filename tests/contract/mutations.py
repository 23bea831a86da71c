"""Mutated checkpoints on every way in: ``python -m tests.contract.mutations COUNT [SEED]`` prints what they led to.

Half of the mutations are accidents: the manifest is changed and its digest is not. The others are hostile: the digest
is computed again, so that only the schemas stand between the values and the run.
"""

import contextlib
import copy
import functools
import json
import logging
import math
import operator
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_light
from lightning_light.errors import LightningLightError
from lightning_light.surgery.attachment import attach
from lightning_light.surgery.manifest import KEY, plain_copy, signed
from tests.contract.case import Case
from tests.contract.runs import checkpoints, differences, module_of, trainer
from tests.contract.table import CASES

JSON_PARTS = ("edit_log", "fingerprint")
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    -0.5,
    0.5,
    1.5,
    math.nan,
    math.inf,
    "",
    "x",
    [],
    {},
    (),
    [1],
    {"x": 1},
    ["x"],
    torch.zeros(()),
    torch.ones(3),
    torch.ones(2, 2, dtype=torch.bool),
    torch.tensor([math.nan]),
]
WAYS = ("hook", "load", "validate", "test", "predict", "fit")
SHARE = (40, 2, 1, 1, 1, 2)


@dataclass(frozen=True)
class Source:
    """A sound checkpoint and the case that wrote it."""

    case: Case
    checkpoint: dict[str, Any]


def sources(names: list[str], folder: Path, steps: tuple[int, ...] = (4, 6, 8, 10, 12)) -> list[Source]:
    """Checkpoints of several steps of every named row of the contract table."""
    found = []
    for case in (case for case in CASES if case.name in names):
        place = folder / case.name
        torch.manual_seed(3)
        trainer(*case.build(place), *checkpoints(place)).fit(module_of(case))
        loaded = (torch.load(place / f"step={step}.ckpt", weights_only=True) for step in steps)
        found += [Source(case, checkpoint) for checkpoint in loaded]
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every item inside nested containers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(value: Any, rng: random.Random) -> Any:
    """Return another value in the place of ``value``: of its kind or of any other."""
    if isinstance(value, Tensor) and rng.random() < 0.7:
        return rng.choice(TENSORS)(value)
    if isinstance(value, bool):
        return rng.choice([not value, int(value), None, "x"])
    if isinstance(value, int | float) and rng.random() < 0.7:
        return rng.choice([-value, value + 1, value * 1000, value / 3, float(value), math.nan, value - 1])
    if isinstance(value, str) and rng.random() < 0.6:
        return rng.choice([value[:-1], value + "x", value.upper(), value[len(value) // 2 :]])
    if isinstance(value, list | tuple) and value:
        return rng.choice([value[:-1], value + value[:1], value[::-1], tuple(value), list(value)])
    return copy.deepcopy(rng.choice(VALUES))


TENSORS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.reshape(-1),
    lambda t: t[None],
    lambda t: t[:-1] if t.ndim else t + 1,
    lambda t: torch.cat([t, t]) if t.ndim else t[None],
    lambda t: t.double(),
    lambda t: t.to(torch.int64),
    lambda t: t.bool(),
    lambda t: torch.full_like(t.float(), math.nan),
    lambda t: torch.full_like(t.float(), math.inf),
    lambda t: ~t if t.dtype == torch.bool else -t.float().to(t.dtype),
    lambda t: t + 100 if t.dtype != torch.bool else ~t,
    lambda t: t.new_empty(0),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse() if t.ndim else t,
    lambda t: t.to(torch.complex64),
]


def mutate(manifest: dict[str, Any], rng: random.Random) -> tuple[Any, str]:
    """Return the manifest with one change, and the change in words."""
    if rng.random() < 0.01:
        return copy.deepcopy(rng.choice(VALUES)), "the whole manifest"
    mutated = plain_copy(manifest, "manifest")
    parsed = JSON_PARTS if rng.random() < 0.8 else ()
    for part in parsed:
        mutated[part] = json.loads(mutated[part])
    path = choose([path for path in places(mutated) if path != ("digest",)], rng)
    while isinstance(holder := functools.reduce(operator.getitem, path[:-1], mutated), tuple):
        path = path[:-1]
    how = rng.choice(list(CHANGES))
    CHANGES[how](holder, path[-1], rng)
    for part in parsed:
        with contextlib.suppress(TypeError, KeyError):  # what is no JSON stays as it is
            mutated[part] = json.dumps(mutated[part])
    return mutated, f"{how} {path}"


def choose(paths: list[tuple[Any, ...]], rng: random.Random) -> tuple[Any, ...]:
    """Choose a part first, and a place in it: else the largest part would get all mutations."""
    parts: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for path in paths:
        parts.setdefault(path[:3] if path[0] == "state" else path[:1], []).append(path)
    return rng.choice(rng.choice(list(parts.values())))


def _rename(holder: Any, key: Any, rng: random.Random) -> None:
    if isinstance(holder, dict):
        holder[rng.choice(["x", "", 7, f"{key}x"])] = holder.pop(key)
    else:
        holder.append(holder.pop(key))


def _add(holder: Any, key: Any, rng: random.Random) -> None:
    new = copy.deepcopy(rng.choice(VALUES))
    if isinstance(holder, dict):
        holder[rng.choice(["x", "weight", 0, "masks"])] = new
    else:
        holder.insert(key, new)


CHANGES: dict[str, Callable[[Any, Any, random.Random], Any]] = {
    "change": lambda holder, key, rng: holder.__setitem__(key, changed(holder[key], rng)),
    "replace": lambda holder, key, rng: holder.__setitem__(key, copy.deepcopy(rng.choice(VALUES))),
    "remove": lambda holder, key, rng: holder.pop(key),
    "rename": _rename,
    "add": _add,
}


def enter(way: str, source: Source, path: Path, checkpoint: dict[str, Any] | None = None) -> Any:
    """Take the checkpoint at ``path`` by one way, or the one given by the module's own hook; returns the module."""
    case, module = source.case, module_of(source.case)
    if way == "hook":
        attach(module)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(source.checkpoint["state_dict"])
        return module
    if way == "load":
        return lightning_light.load_from_checkpoint(type(module), path, weights_only=True)
    run = trainer(*case.build(path.parent / "run"))
    if way == "fit":
        run.fit(module, ckpt_path=path)
    elif way == "predict":
        run.predict(module, DataLoader(module.train_dataloader().batches[0][0], batch_size=8), ckpt_path=path)
    else:
        getattr(run, way)(module, ckpt_path=path, verbose=False)
    return module


def survey(pool: list[Source], count: int, seed: int, ways: tuple[str, ...] = WAYS) -> tuple[Counter[str], list[str]]:
    """Enter ``count`` mutated checkpoints; returns the number of each outcome, and what is wrong, in words."""
    rng, outcomes, wrong = random.Random(seed), Counter[str](), []
    weights = [share for way, share in zip(WAYS, SHARE, strict=True) if way in ways]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "mutated.ckpt"
        for number in range(count):
            source, way = rng.choice(pool), rng.choices(ways, weights)[0]
            manifest, what = mutate(source.checkpoint[KEY], rng)
            hostile = rng.random() < 0.5
            if hostile and isinstance(manifest, dict):
                with contextlib.suppress(TypeError, RuntimeError):  # what has no digest stays without
                    manifest = signed(manifest)
            checkpoint = source.checkpoint | {KEY: manifest}
            if way != "hook":
                torch.save(checkpoint, path)
            start = time.perf_counter()
            label = f"{number} {source.case.name} {way} {'hostile' if hostile else 'accident'}: {what}"
            try:
                enter(way, source, path, checkpoint)
            except LightningLightError as error:
                outcomes[f"refused, {type(error).__name__}"] += 1
            except Exception as error:  # noqa: BLE001  # what must not happen is counted
                outcomes["foreign exception"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                wrong.append(f"{label} -> {type(error).__name__}: {str(error)[:150]} ({where.filename}:{where.lineno})")
            else:
                same = unchanged(manifest, source.checkpoint[KEY])
                outcomes["unchanged" if same else f"accepted, {'hostile' if hostile else 'accident'}"] += 1
                if not hostile and not same:
                    wrong.append(f"{label} -> accepted")
            if time.perf_counter() - start > 60:
                wrong.append(f"{label} -> took {time.perf_counter() - start:.0f} s")
    return outcomes, wrong


def unchanged(mutated: Any, manifest: dict[str, Any]) -> bool:
    """Whether the mutation left everything but the digest, and the kind of number and sequence, as it was."""
    with contextlib.suppress(TypeError, RuntimeError):
        return isinstance(mutated, dict) and not differences(
            {**manifest, "digest": None}, {key: mutated.get(key) for key in manifest} | {"digest": None}
        )
    return False


def main(count: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        pool = sources([case.name for case in CASES if case.full], Path(folder), (7, 12))
        for start in range(0, count, 500):
            outcomes, wrong = survey(pool, min(500, count - start), seed * 1_000_003 + start)
            total += outcomes
            print(*wrong, json.dumps(dict(sorted(total.items()))), sep="\n", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
