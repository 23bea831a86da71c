"""Run experiments, and keep their results as JSON."""

import copy
import importlib.metadata
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_light as ll
from benchmarks.experiments.methods import Run, top1
from benchmarks.experiments.table import Experiment
from benchmarks.experiments.tasks import QUIET, Task
from lightning_light.atomic import atomic_write
from lightning_light.measure import count_cost, deflated_bytes, file_bytes, measure_sparsity

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("lightning-light", "torch", "lightning", "torch-pruning", "onnxruntime")
TIMED_ROUNDS = 300


@dataclass(frozen=True)
class Job:
    """One seed of one experiment, whose result is a file in ``folder``."""

    experiment: Experiment
    task: Task
    epochs: int
    seed: int
    folder: Path

    @property
    def path(self) -> Path:
        """The file of the result."""
        return self.folder / f"{self.experiment.name}-{self.seed}.json"

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on."""
        method = repr(self.experiment.method)
        return {"task": self.task.name, "method": method, "epochs": self.epochs, "seed": self.seed}

    def done(self) -> bool:
        """Whether the file holds the result of these settings."""
        return self.path.exists() and json.loads(self.path.read_text())["settings"] == self.settings


def run_missing(jobs: Iterable[Job], work: Path, report: Callable[[str], None]) -> None:
    """Run the jobs without a result; one that is interrupted leaves no file and starts over next time."""
    for job in jobs:
        missing = job.task.missing()
        if missing is not None:
            report(f"{job.path.stem}: left out, needs {missing}")
        elif not job.done():
            result = run(job, work)
            with atomic_write(job.path) as part:
                part.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
            report(f"{job.path.stem}: {result['accuracy']:.2%}, {result['training_seconds']:.0f} s")


def run(job: Job, work: Path) -> dict[str, Any]:
    """Run one job, and measure the network that it ends with."""
    dense = job.task.trained(job.seed)
    L.seed_everything(job.seed, verbose=False)
    state = Run(job.task, job.task.module(copy.deepcopy(dense)), dense)
    seconds = _train(job, state, work)
    module = state.module.eval()
    found = {"training_seconds": seconds, "settings": job.settings, "dense": _measured_dense(job, dense, work)}
    with job.experiment.method.deployed(state):
        found["accuracy"] = top1(module, job.task)
        found["file"] = _measured_file(job, module, work) if state.exportable else None
    cost = count_cost(module if state.exportable else dense, (job.task.example,))  # converted kernels are not counted
    return {
        **found,
        "macs": cost.macs,
        "params": cost.params,
        "sparsity": measure_sparsity(module).sparsity if state.exportable else 0.0,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "machine": {"processor": processor(), "python": platform.python_version(), "threads": torch.get_num_threads()},
    }


def _train(job: Job, state: Run, work: Path) -> float:
    """Apply the method; return seconds of processor time."""
    method, started = job.experiment.method, time.process_time()
    method.prepare(state)
    state.module.train()  # the Trainer keeps the mode of a module
    if job.epochs:
        options = {"precision": job.task.precision, "default_root_dir": work, **QUIET}
        trainer = L.Trainer(max_epochs=job.epochs, callbacks=method.callbacks(state), **options)
        trainer.fit(state.module, job.task.train_loader())
    method.finish(state)
    return time.process_time() - started


def _measured_dense(job: Job, dense: nn.Module, work: Path) -> dict[str, Any]:
    """Measure the dense network, once per seed."""
    path = work / f"dense-{job.experiment.network}-{job.seed}.json"
    if not path.exists():
        module = job.task.module(copy.deepcopy(dense)).eval()
        cost = count_cost(module, (job.task.example,))
        file = _exported(module, job.task, path.with_suffix(".onnx"))
        found = {"accuracy": top1(module, job.task), "macs": cost.macs, "params": cost.params}
        with atomic_write(path) as part:
            part.write_text(json.dumps({**found, **_sizes(file)}))
    return json.loads(path.read_text())


def _measured_file(job: Job, module: nn.Module, work: Path) -> dict[str, Any]:
    """Export, and measure the file beside that of the dense network; call after `_measured_dense`."""
    path = _exported(module, job.task, work / "exported.onnx")
    file, dense = session(path), session(work / f"dense-{job.experiment.network}-{job.seed}.onnx")
    return {**_sizes(path), "accuracy": top1(file, job.task), "latency": in_turns(file, dense, job.task.example)}


def _exported(module: nn.Module, task: Task, path: Path) -> Path:
    """Write an ONNX file for batches of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ll.export_model(module, task.example, path, batch="any", latency_runs=1)
    return path


def _sizes(path: Path) -> dict[str, int]:
    return {"bytes": file_bytes(path), "deflated": deflated_bytes(path)}


def session(path: Path) -> Callable[[Tensor], Tensor]:
    """Load an ONNX file in ONNX Runtime with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    loaded = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = loaded.get_inputs()[0].name
    return lambda images: torch.from_numpy(loaded.run(None, {name: images.numpy()})[0])


def in_turns(file: Callable[[Tensor], Tensor], dense: Callable[[Tensor], Tensor], example: Tensor) -> dict[str, float]:
    """Time both on one sample in turns; return median seconds, and the median of the ratios of all rounds."""
    times: list[tuple[float, float]] = []
    for _ in range(TIMED_ROUNDS + 10):
        marks = [time.perf_counter()]
        for call in (file, dense):
            call(example)
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    own, others = zip(*times[10:], strict=True)
    ratio = median(a / b for a, b in times[10:])
    return {"seconds": median(own), "dense_seconds": median(others), "ratio": ratio}


def processor() -> str:
    """Return the model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
