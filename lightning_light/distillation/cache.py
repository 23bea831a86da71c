"""The teacher's answers, kept by sample: from the second epoch on it costs nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_light.example_input import tensors_in
from lightning_light.surgery.distributed import digest

__all__ = ["TeacherOutputCache", "caches_of", "fingerprints"]

_FIRST_ROWS = 1024


def fingerprints(inputs: Any, samples: int) -> list[int]:
    """A 63-bit number for each sample of what a teacher is given: the same content, the same number.

    Args:
        inputs: nest of tensors; those with ``samples`` rows count.
        samples: how many.
    """
    hashes = [hashlib.sha1(usedforsecurity=False) for _ in range(samples)]  # the fastest that processors help with
    for tensor in tensors_in(inputs):
        if tensor.ndim and len(tensor) == samples:
            data = tensor.detach().cpu().contiguous()
            content = data.reshape(samples, -1).view(torch.uint8) if data.ndim > 1 else data[:, None].view(torch.uint8)
            for found, row in zip(hashes, content.numpy(), strict=True):
                found.update(row.data)
    return [int.from_bytes(found.digest()[:8], "little") >> 1 for found in hashes]


def caches_of(
    where: str, half: bool, teachers: Sequence[nn.Module], state: dict[str, Any], rank: int | None
) -> list[TeacherOutputCache]:
    """A cache for each teacher.

    Args:
        where: ``"memory"``, or the path of files.
        half: whether to store half precision.
        teachers: the teachers.
        state: of the method; remembers what is in memory.
        rank: of this process, whose files are its own; None if there is one process.
    """
    if where == "memory":
        kept = state.setdefault("cache", {})
        return [
            TeacherOutputCache(kept.setdefault(str(place), {}), None, half=half, teacher="")
            for place in range(len(teachers))
        ]
    caches = []
    for place, teacher in enumerate(teachers):
        path = Path(f"{where}{f'.{place}' if place else ''}{'' if rank is None else f'.rank{rank}'}")
        name = f"{digest(dict(teacher.state_dict()))} half={half}"
        caches.append(TeacherOutputCache(None, path, half=half, teacher=name))
    return caches


class TeacherOutputCache:
    """Rows of answers by key, in memory or in files.

    What is read back is what was stored, half precision and all, also in the step that stores it: so a run that was
    interrupted, and finds the cache fuller or emptier than it was, goes on as it would have.

    Args:
        state: where an in-memory cache is remembered: part of the method's state; None for a cache in files.
        path: of the files, ``<path>.json``, ``<path>.keys`` and ``<path>.rows``; None for memory.
        half: whether to store half precision.
        teacher: fingerprint of the teacher; files of another teacher are refused.
    """

    def __init__(self, state: dict[str, Any] | None, path: Path | None, *, half: bool, teacher: str) -> None:
        self._state, self._path, self._half, self._teacher = state, path, half, teacher
        self._places: dict[int, int] = {}
        self._keys = torch.empty(0, 2, dtype=torch.int64)  # of each row: key, fingerprint
        self._rows: Tensor | None = None
        if state:
            self._adopt(state["keys"], state["rows"])
        elif path is not None and self._file("json").exists():
            self._open()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, keys: list[int], checks: list[int] | None) -> Tensor | None:
        """The stored answers of these samples; None unless there are all.

        Args:
            keys: of the samples.
            checks: fingerprints of what the teacher would see, compared with those of what it saw.

        Raises:
            ValueError: a sample looks different from when it was stored.
        """
        if self._rows is None or any(key not in self._places for key in keys):
            return None
        places = [self._places[key] for key in keys]
        if checks is not None and self._keys[places, 1].tolist() != checks:
            raise ValueError(
                "`KnowledgeDistillation(cache=...)`: expected every sample to look the same in each epoch, found one "
                "that does not: it is augmented, and the teacher's stored answer belongs to another view. Augment "
                "without randomness, drop `cache`, or, if the answers shall be those of the first view, say "
                "`fixed_views=True`."
            )
        return self._rows[torch.tensor(places)]

    def put(self, keys: list[int], checks: list[int], answers: Tensor) -> Tensor:
        """Store the answers of samples that are not stored yet; returns those of all as they are read back."""
        stored = answers.detach().to("cpu", torch.float16 if self._half else answers.dtype)
        new = {key: place for place, key in enumerate(keys) if key not in self._places}
        if new:
            start = len(self._places)
            self._reserve(start + len(new), stored)
            assert self._rows is not None
            for row, (key, place) in enumerate(new.items(), start):
                self._rows[row] = stored[place]
                self._keys[row] = torch.tensor([key, checks[place]])
                self._places[key] = row
            self._remember(start)
        return self.recall(keys)

    def recall(self, keys: Iterable[int]) -> Tensor:
        """The stored answers of samples that are stored."""
        assert self._rows is not None
        return self._rows[torch.tensor([self._places[key] for key in keys])]

    def _adopt(self, keys: Tensor, rows: Tensor) -> None:
        self._places = {key: place for place, key in enumerate(keys[:, 0].tolist())}
        self._keys, self._rows = keys.clone(), rows[: len(keys)]

    def _reserve(self, count: int, like: Tensor) -> None:
        have = len(self._keys)
        if count <= have:
            return
        size, rows, keys = max(count, 2 * have, _FIRST_ROWS), self._rows, self._keys
        self._keys = torch.zeros(size, 2, dtype=torch.int64)
        self._keys[:have] = keys
        if self._path is not None:
            if rows is None:
                self._create(like)
            self._rows = self._mapped(size, tuple(like.shape[1:]), like.dtype)
            return
        self._rows = like.new_zeros((size, *like.shape[1:]))
        if rows is not None:
            self._rows[:have] = rows

    def _remember(self, start: int) -> None:
        count = len(self._places)
        if self._path is not None:
            with self._file("keys").open("ab") as file:
                self._keys[start:count].numpy().tofile(file)
        elif self._state is not None:
            assert self._rows is not None
            self._state.update(keys=self._keys[:count], rows=self._rows[:count])

    def _file(self, suffix: str) -> Path:
        assert self._path is not None
        return self._path.parent / f"{self._path.name}.{suffix}"

    def _create(self, like: Tensor) -> None:
        header = {"shape": list(like.shape[1:]), "dtype": str(like.dtype), "teacher": self._teacher}
        self._file("json").parent.mkdir(parents=True, exist_ok=True)
        self._file("rows").write_bytes(b"")
        self._file("keys").write_bytes(b"")
        self._file("json").write_text(json.dumps(header))

    def _mapped(self, size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        row = torch.empty(shape, dtype=dtype).nbytes
        with self._file("rows").open("r+b") as opened:
            opened.truncate(size * row)
        mapped = np.memmap(self._file("rows"), np.uint8, "r+", shape=(size * row,))
        return torch.from_numpy(mapped).view(dtype).reshape(size, *shape)

    def _open(self) -> None:
        header = json.loads(self._file("json").read_text())
        if header["teacher"] != self._teacher:
            raise ValueError(
                f"`KnowledgeDistillation(cache={str(self._path)!r})`: expected answers of this teacher, found those of "
                "another one. Delete the files, or give another path."
            )
        keys = torch.from_numpy(np.fromfile(self._file("keys"), np.int64).reshape(-1, 2))
        dtype = getattr(torch, header["dtype"].removeprefix("torch."))
        self._adopt(keys, self._mapped(max(len(keys), 1), tuple(header["shape"]), dtype))
