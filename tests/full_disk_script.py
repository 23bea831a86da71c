"""Every file that this package writes, on a disk that is full: ``python -m tests.full_disk_script FOLDER``.

Writes each file twice, the second time with a limit on the size of files; prints one line of JSON: the error of the
second time, whether the first file is still whole, and what is left beside it.
"""

import json
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_light as ll
from lightning_light.clustering import save_clustered
from tests.contract.bodies import Body, module_class
from tests.contract.runs import trainer

LIMIT = 1024


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond `LIMIT` bytes inside."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def twice(path: Path, write: Callable[[], Any]) -> dict[str, Any]:
    """Write, write again on a full disk, and look at what is there."""
    write()
    before, beside = path.read_bytes(), set(path.parent.iterdir())
    error = None
    try:
        with full_disk():
            write()
    except Exception as raised:  # noqa: BLE001  # its name is what is looked at
        error = type(raised).__name__
    left = [other.name for other in path.parent.iterdir() if other not in beside and other.suffix != ".ckpt"]
    return {"error": error, "same": path.read_bytes() == before, "left": left}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.set_num_threads(1)
    module = module_class(Body, lightning.pytorch)()
    images = module.train_dataloader().batches[0][0]
    run = trainer(ll.StructuredPruning(ll.Channels(0.5)), ModelCheckpoint(folder, "last", save_top_k=-1))
    run.fit(module)
    last, expanded, small, file = (folder / name for name in ("last.ckpt", "x.ckpt", "x.safetensors", "x.ptl"))
    found = {
        "checkpoint": twice(last, lambda: run.save_checkpoint(last)),
        "expand": twice(
            expanded, lambda: ll.expand_checkpoint(last, expanded, module_class(Body, lightning.pytorch)())
        ),
        "clustering": twice(small, lambda: save_clustered(module, small)),
        "export": twice(file, lambda: ll.export_model(module.eval(), images, file, latency_runs=1)),
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
