"""Write a file, run the file, compare, measure: all of an export that needs no Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from lightning_light.errors import ParityError
from lightning_light.example_input import ExampleInput
from lightning_light.export.copies import detached_copy
from lightning_light.export.exporter import Exporter
from lightning_light.export.inputs import (
    Positional,
    batch_size,
    batched,
    cloned,
    first_sample,
    first_samples,
    in_order,
    samples,
    sliced,
    tripled,
)
from lightning_light.export.parity import Parity, Tolerance, compare
from lightning_light.export.report import ExportReport
from lightning_light.export.top1 import Labelled, compare_top1
from lightning_light.export.torchscript_lite import TorchScriptLite
from lightning_light.isolation import plain_execution
from lightning_light.measure import count_cost, deflated_bytes, file_bytes, measure_latency
from lightning_light.measure.latency import torch_threads

__all__ = ["Batch", "check_options", "export_model"]

Batch = Literal["any", "one", "as_given"]

# The defaults of the function and of the callback.
EXPORTER: Exporter = TorchScriptLite()
PARITY = Tolerance()
BATCH: Batch = "any"
LATENCY_RUNS = 50
LATENCY_THREADS = 1

_SAMPLES = 8  # of each batch, where samples are compared one at a time


def export_model(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    exporter: Exporter = EXPORTER,
    parity: Tolerance = PARITY,
    batches: Sequence[ExampleInput] = (),
    validation: Iterable[Labelled] = (),
    batch: Batch = BATCH,
    latency_runs: int = LATENCY_RUNS,
    latency_threads: int = LATENCY_THREADS,
) -> ExportReport:
    """Export a copy of ``model``, and vouch for the file.

    The file is written beside its final place, loaded by its own runtime, compared with the model, timed, and only
    then given its name; an older file of that name stays if anything fails. A report goes to ``{path}.json``.
    ``model`` is as before: modes, buffers, gradients, hooks, device. So are the generators of torch, NumPy and Python.

    Args:
        model: on any device, in any mode.
        args: an example of the positional inputs, the batch first.
        path: where the file goes; ends in the exporter's suffix.
        kwargs: an example of the keyword inputs. What is no tensor becomes part of the file; tensors become positional
            inputs, in the order of the signature of ``forward``.
        exporter: file format and runtime.
        parity: how far an answer may be off.
        batches: real inputs to compare on, besides the example.
        validation: calls and labels to compare the classes of an int8 file on; of a float file they are the model's.
            It is asked for them one by one, and not at all without need.
        batch: ``any``: exported from one sample, and held to run with other batch sizes; ``one``: to run with one
            sample at a time; ``as_given``: the inputs have no batch dimension, or shall keep exactly their shapes.
        latency_runs: calls of the file that are timed, after a warm-up.
        latency_threads: of the runtime in them.

    Raises:
        TraceError: the format cannot express the model.
        ParityError: the file answers differently, or fails.
        UnsupportedError: the format or its runtime is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_model(model, (torch.randn(4, 3, 8, 8),), f"{folder}/model.ptl", latency_runs=5)
        >>> report.inputs, report.macs, report.details["batch_norms_left"]
        ([{'name': 'input', 'shape': [1, 3, 8, 8], 'dtype': 'float32'}], 18944, 0)
    """
    check_options(path, exporter, batch, latency_runs, latency_threads)
    exporter.check()
    with plain_execution(), _unfinished(Path(path)) as part:
        given = cloned(ExampleInput(args, dict(kwargs or {})))
        example = given if batch == "as_given" else first_sample(given)
        right = Positional(detached_copy(model), example)
        tensors = right.tensors(example)
        copy = Positional(detached_copy(model), example, batched(given) if batch == "any" else None)
        details = exporter.write(copy, right.tensors(cloned(example)), part)
        with torch_threads(latency_threads):
            run = exporter.load(part)
        fitting = [call for call in batches if right.fits(call) and (batch != "as_given" or _alike(call, example))]
        calls = _calls([given, *fitting], batch, exporter.largest_batch)
        found = _compare(right, run, calls, parity, details.get("output_scales"))
        asked = _asked(validation, right, batch, exporter.largest_batch) if "output_scales" in details else ()
        top1 = compare_top1(
            lambda call: right(*right.tensors(cloned(call))), lambda call: run(*right.tensors(cloned(call))), asked
        )
        latency = measure_latency(lambda: run(*tensors), runs=latency_runs, threads=latency_threads)
        cost = count_cost(right.model, example.args, example.kwargs)
        report = ExportReport(
            file=str(path),
            exporter=repr(exporter),
            runtime=exporter.runtime(),
            bytes=file_bytes(part),
            deflated_bytes=deflated_bytes(part),
            params=cost.params,
            macs=cost.macs,
            latency=latency,
            parity=found,
            parity_batches=len(fitting),
            top1=top1,
            tolerance=parity,
            inputs=_described(right, tensors),
            built_in={name: repr(value) for name, value in right.constants.items()},
            batch=batch,
            details=details,
        )
    report.write(f"{path}.json")
    return report


def check_options(path: str | os.PathLike[str], exporter: Exporter, batch: str, runs: int, threads: int) -> None:
    """Refuse wrong arguments, of the function and of the callback alike.

    Raises:
        ValueError: says which, and what was expected.
    """
    if Path(path).suffix != exporter.suffix:
        raise ValueError(
            f"`{str(path)!r}` with `exporter={exporter}`: expected a path that ends in {exporter.suffix!r}, found "
            f"{Path(path).suffix!r}. Write {str(Path(path).with_suffix(exporter.suffix))!r}."
        )
    if batch not in get_args(Batch):
        raise ValueError(f"`batch={batch!r}`: expected one of {list(get_args(Batch))}. Usual is 'any'.")
    if batch == "any" and exporter.largest_batch == 1:
        raise ValueError(
            f"`batch='any'` with `exporter={exporter}`: expected an exporter whose files run with other batch sizes, "
            "found one for one sample at a time. Write `batch='one'`."
        )
    if runs < 1 or threads < 1:
        raise ValueError(f"`latency_runs={runs}, latency_threads={threads}`: expected two integers >= 1.")


def _asked(
    validation: Iterable[Labelled], right: Positional, batch: Batch, largest: int | None
) -> Iterator[tuple[Labelled, list[ExampleInput], list[ExampleInput]]]:
    """What fits, whole as the model takes it, and in parts as the file does."""
    for asked in validation:
        size = batch_size(asked.call)
        if size is None or not right.fits(asked.call):
            continue
        part = 1 if batch == "one" else (largest or size) if batch == "any" else size
        parts = (
            [asked.call]
            if part >= size
            else [sliced(asked.call, start, start + part) for start in range(0, size, part)]
        )
        yield asked, parts if batch == "one" else [asked.call], parts


def _alike(call: ExampleInput, example: ExampleInput) -> bool:
    shapes = [
        [leaf.shape for leaf in tree_leaves((one.args, one.kwargs)) if isinstance(leaf, Tensor)]
        for one in (call, example)
    ]
    return shapes[0] == shapes[1]


def _calls(given: list[ExampleInput], batch: Batch, largest: int | None) -> list[ExampleInput]:
    """What is compared: whole batches, at least one of one sample and one of several; or samples."""
    if batch == "as_given":
        return given
    if batch == "one":
        return [sample for call in given for sample in samples(call, _SAMPLES)] or given
    sizes = {batch_size(call) for call in given}
    if sizes == {1}:
        given = [*given, tripled(given[0])]
    elif not sizes & {1, None}:
        given = [*given, first_sample(given[0])]
    return [first_samples(call, largest) for call in given]


def _compare(
    right: Positional,
    run: Callable[..., Any],
    calls: list[ExampleInput],
    tolerance: Tolerance,
    scales: list[float] | None,
) -> Parity:
    def ask(call: ExampleInput) -> Any:
        try:
            return run(*right.tensors(cloned(call)))
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ParityError(
                f"The exported file, asked for {batch_size(call)} samples: expected it to run as the model does, found "
                f"{type(error).__name__}: {reason}. It was exported from one sample, and a size, in `forward` or by "
                "the runtime, was built in: use tensor operations (`x.flatten(1)`, `x.shape[0]` without `int(...)`), "
                "or promise one sample at a time with `batch='one'`; inputs without a batch dimension need "
                "`batch='as_given'`."
            ) from error

    return compare(
        lambda call: right(*right.tensors(cloned(call))),
        ask,
        [(batch_size(call) or 1, call) for call in calls],
        tolerance,
        scales,
    )


def _described(right: Positional, tensors: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [
        {"name": name + keystr(place), "shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
        for name, value in zip(right.names, tensors, strict=True)
        for place, leaf in tree_flatten_with_path(in_order(value))[0]
        if isinstance(leaf, Tensor)
    ]


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A place beside ``path``; what is there moves to ``path`` if all goes well, and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
