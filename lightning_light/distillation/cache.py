"""Cache the teacher's outputs by sample, so that they are computed in the first epoch only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.nested import tensors_in
from lightning_light.schema import Length, Needs, TensorOf
from lightning_light.selectors import Selector, select
from lightning_light.surgery.distributed import digest
from lightning_light.validation import validated

__all__ = ["CachedOutputs", "OutputStore", "StoredOutputs", "TeacherCache", "fingerprints", "samples_of", "stores_of"]

_FIRST_ROWS = 1024


@validated
@dataclass(frozen=True)
class TeacherCache:
    """Store the teacher's outputs by sample; from the second epoch on the teacher is not called.

    Args:
        location: ``"memory"``, or the path of files, which later runs with the same teacher read.
        sample_index: which part of a batch numbers its samples; without it a sample is identified by a hash of its
            content.
        fixed_views: whether the stored output of a sample is used although its content has changed (augmentation).
        half_precision: whether outputs are stored in half precision.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: in the run: the samples of an epoch differ from the stored ones, or the files are those of another
            teacher.

    Example:
        >>> TeacherCache("runs/teacher", sample_index=2)
        TeacherCache(location='runs/teacher', sample_index=2, fixed_views=False, half_precision=False)
    """

    location: str = "memory"
    sample_index: Selector = None
    fixed_views: bool = False
    half_precision: bool = False


class StoredOutputs(TypedDict, total=False):
    """Rows of an `OutputStore` in memory, and of each its key and fingerprint."""

    keys: Annotated[Tensor, TensorOf("integer", 2), Needs("rows"), Length("rows")]
    rows: Annotated[Tensor, TensorOf()]


class CachedOutputs:
    """Reads a teacher's outputs from its store, or computes and stores them.

    Args:
        options: what the user has set.
        store: of this teacher.
        samples: returns how many samples the data has, once it is loaded; None if it is not known.
    """

    def __init__(self, options: TeacherCache, store: OutputStore, samples: Callable[[], int | None]) -> None:
        self._options, self._store, self._samples = options, store, samples

    def outputs(self, inputs: ExampleInput, batch: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return the teacher's outputs for a batch, on the CPU.

        Args:
            inputs: of the teacher.
            batch: as ``training_step`` gets it.
            compute: calls the teacher.

        Raises:
            ValueError: the samples are augmented, so that stored outputs belong to other views.
        """
        index, fixed = self._options.sample_index, self._options.fixed_views
        samples = len(next(tensors_in((inputs.args, inputs.kwargs))))
        identified = index is not None and fixed
        hashes = [0] * samples if identified else fingerprints((inputs.args, inputs.kwargs), samples)
        call = f"TeacherCache(sample_index={index!r})"
        keys = hashes if index is None else select(batch, index, call).reshape(-1).tolist()
        found = self._store.read(keys, None if fixed else hashes)
        if found is None:
            found = self._store.write(keys, hashes, compute())
        available = self._samples() if index is None else None
        if available is not None and len(self._store) > available:
            raise ValueError(
                f"`KnowledgeDistillation(cache={self._options})`: expected at most {available} different inputs, "
                f"one per sample of the data, found {len(self._store)}: the samples are augmented, so that no stored "
                "output is ever used. Augment without randomness, or remove `cache`; `TeacherCache(sample_index=..., "
                "fixed_views=True)` uses the outputs of each sample's first view."
            )
        return found


def fingerprints(inputs: Any, samples: int) -> list[int]:
    """Hash each sample of a teacher's inputs to a 63-bit number.

    Args:
        inputs: nested tensors; those with ``samples`` rows are hashed.
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


def samples_of(trainer: Any) -> int | None:
    """Return the number of training samples, if the dataset has a length."""
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else None


def stores_of(
    options: TeacherCache, teachers: Sequence[nn.Module], state: dict[str, Any], rank: int | None
) -> list[OutputStore]:
    """Open a store per teacher.

    Args:
        options: location and precision.
        teachers: the teachers.
        state: of the method; holds the rows of a store in memory.
        rank: of this process, which has its own files; None if there is one process.
    """
    half, stores = options.half_precision, []
    for number, teacher in enumerate(teachers):
        if options.location == "memory":
            rows = state.setdefault("cache", {}).setdefault(str(number), {})
            stores.append(OutputStore(rows, None, half=half, teacher=""))
            continue
        path = Path(f"{options.location}{f'.{number}' if number else ''}{'' if rank is None else f'.rank{rank}'}")
        stores.append(OutputStore(None, path, half=half, teacher=f"{digest(dict(teacher.state_dict()))} half={half}"))
    return stores


class OutputStore:
    """Rows of a teacher's outputs by key, in memory or in files.

    A row is always returned as it was stored, in half precision if so, also in the step that stores it. An interrupted
    run therefore continues bit for bit, whatever the store contains when it is resumed.

    Args:
        state: holds the rows in memory, as part of the method's state; None for a store in files.
        path: of the files ``<path>.json``, ``<path>.keys`` and ``<path>.rows``; None for memory.
        half: whether to store half precision.
        teacher: digest of the teacher; files of another teacher are refused.
    """

    def __init__(self, state: dict[str, Any] | None, path: Path | None, *, half: bool, teacher: str) -> None:
        self._state, self._path, self._half, self._teacher = state, path, half, teacher
        self._positions: dict[int, int] = {}
        self._keys = torch.empty(0, 2, dtype=torch.int64)  # of each row: key, fingerprint
        self._rows: Tensor | None = None
        if state:
            self._fill(state["keys"], state["rows"])
        elif path is not None and self._file("json").exists():
            self._open()

    def __len__(self) -> int:
        return len(self._positions)

    def read(self, keys: list[int], hashes: list[int] | None) -> Tensor | None:
        """Return the stored outputs of these samples, or None unless all of them are stored.

        Args:
            keys: of the samples.
            hashes: of the teacher's inputs, compared with those at the time of storing; None for no comparison.

        Raises:
            ValueError: the content of a sample has changed since.
        """
        if self._rows is None or any(key not in self._positions for key in keys):
            return None
        positions = [self._positions[key] for key in keys]
        if hashes is not None and self._keys[positions, 1].tolist() != hashes:
            raise ValueError(
                "`KnowledgeDistillation(cache=...)`: expected the same content of every sample in each epoch, found a "
                "sample with another content: it is augmented, and the stored output belongs to another view. Augment "
                "without randomness, remove `cache`, or, to use the outputs of the first view, write "
                "`TeacherCache(fixed_views=True)`."
            )
        return self._rows[torch.tensor(positions)]

    def write(self, keys: list[int], hashes: list[int], outputs: Tensor) -> Tensor:
        """Store the outputs of samples that are not stored yet, and return those of all samples as stored."""
        stored = outputs.detach().to("cpu", torch.float16 if self._half else outputs.dtype)
        new = {key: position for position, key in enumerate(keys) if key not in self._positions}
        start = len(self._positions)
        rows = self._reserved(start + len(new), stored)
        for row, (key, position) in enumerate(new.items(), start):
            rows[row] = stored[position]
            self._keys[row] = torch.tensor([key, hashes[position]])
            self._positions[key] = row
        if new:
            self._save(start)
        return rows[torch.tensor([self._positions[key] for key in keys])]

    def _fill(self, keys: Tensor, rows: Tensor) -> None:
        self._positions = {key: position for position, key in enumerate(keys[:, 0].tolist())}
        self._keys, self._rows = keys.clone(), rows[: len(keys)]

    def _reserved(self, count: int, like: Tensor) -> Tensor:
        """Return the rows, of which there are at least ``count``."""
        have = len(self._keys)
        if self._rows is not None and count <= have:
            return self._rows
        size, rows, keys = max(count, 2 * have, _FIRST_ROWS), self._rows, self._keys
        self._keys = torch.zeros(size, 2, dtype=torch.int64)
        self._keys[:have] = keys
        if self._path is not None:
            if rows is None:
                self._create(like)
            self._rows = self._mapped(size, tuple(like.shape[1:]), like.dtype)
        else:
            self._rows = like.new_zeros((size, *like.shape[1:]))
            if rows is not None:
                self._rows[:have] = rows
        return self._rows

    def _save(self, start: int) -> None:
        count = len(self._positions)
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
                f"`TeacherCache({str(self._path)!r})`: expected outputs of this teacher, found those of another one. "
                "Delete the files, or give another path."
            )
        stored = np.fromfile(self._file("keys"), np.int64)
        keys = torch.from_numpy(stored[: len(stored) // 2 * 2].reshape(-1, 2))  # a killed process wrote half a row
        dtype = getattr(torch, header["dtype"].removeprefix("torch."))
        self._fill(keys, self._mapped(max(len(keys), 1), tuple(header["shape"]), dtype))
