"""Export a model to a file, and verify the file: parity with the model, metrics, latency, size."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_light.atomic import atomic_write
from lightning_light.errors import ParityError
from lightning_light.example_input import ExampleInput, example_of_batch
from lightning_light.export.copies import detached_copy, merged_copy
from lightning_light.export.dependence import needed_inputs
from lightning_light.export.evaluation import DataEvaluator, Evaluator, MetricInputs
from lightning_light.export.exporter import Exporter
from lightning_light.export.formats import exporter_of
from lightning_light.export.inputs import (
    Positional,
    altered,
    batch_size,
    cloned,
    first_sample,
    first_samples,
    in_order,
    is_within,
    samples,
    tripled,
)
from lightning_light.export.int8 import check_details, warn_of_float_file
from lightning_light.export.networks import ExportedNetwork, ReferenceNetwork
from lightning_light.export.parity import Parity, Tolerance, compare_outputs
from lightning_light.export.report import ExportReport
from lightning_light.isolation import plain_execution
from lightning_light.measure import count_cost, deflated_bytes, file_bytes, measure_latency
from lightning_light.measure.latency import torch_threads
from lightning_light.measure.metrics import MetricLike
from lightning_light.nested import named_leaves
from lightning_light.validation import PositiveInt, validated

__all__ = ["Batch", "ExportOptions", "export_model", "export_verified", "verify_exported"]

Batch = Literal["any", "one", "as_given"]

_PARITY_BATCHES = 4
_CONSTANT = "It was exported from one sample, and a size became a constant, in `forward` or in the runtime:"
_ADVICE: dict[Batch, str] = {
    "any": f"{_CONSTANT} use tensor operations (`x.flatten(1)`, `x.shape[0]` without `int(...)`), or export for one "
    "sample at a time with `batch='one'`; inputs without a batch dimension need `batch='as_given'`.",
    "one": f"{_CONSTANT} use tensor operations; inputs that always have the example's shapes need `batch='as_given'`.",
    "as_given": "A size became a constant, in `forward` or in the runtime: give batches of the example's shapes "
    "(`drop_last=True` in a loader), or export with `batch='any'`.",
}
_SAMPLES = 8  # of each batch, where samples are compared one at a time


@validated
@dataclass(frozen=True)
class ExportOptions:
    """Options of `export_model` and `MobileExport`, and their defaults.

    Args:
        exporter: file format and runtime; None to choose by the suffix of the path.
        parity: maximum difference of an output of the file to the model's.
        batch: ``any``: exported from one sample and verified with other batch sizes; ``one``: verified with one sample
            at a time; ``as_given``: the inputs have no batch dimension, or keep exactly their shapes.
        latency_runs: timed calls of the file, after a warm-up.
        latency_threads: threads of the runtime in them.
        merge_branches: export blocks of parallel branches merged: those of `Reparameterization`, and blocks with a
            method ``fuse``, ``reparameterize`` or ``switch_to_deploy``. Not in a quantized network.
        inputs: the inputs of the file: arguments of ``forward`` (``x``), or tensors in them (``batch['image']``). Other
            arguments are left out of the call if they have a default, items of dicts are left out of the dict, and what
            remains must not change the outputs. None: all inputs that the outputs are computed from.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    exporter: Exporter | None = None
    parity: Tolerance = Tolerance()
    batch: Batch = "any"
    latency_runs: PositiveInt = 50
    latency_threads: PositiveInt = 1
    merge_branches: bool = True
    inputs: Sequence[str] | None = None

    def for_path(self, path: str | os.PathLike[str]) -> Exporter:
        """Check the options, and return the exporter for ``path``.

        Raises:
            ValueError: an argument is out of range, or does not fit the path.
        """
        exporter = exporter_of(path, self.exporter)
        if self.batch == "any" and exporter.largest_batch == 1:
            raise ValueError(
                f"`batch='any'` with `exporter={exporter}`: expected an exporter whose files run with other batch "
                "sizes, found one for one sample at a time. Write `batch='one'`."
            )
        return exporter


@validated
def export_model(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    exporter: Exporter | None = ExportOptions.exporter,
    data: Iterable[Any] = (),
    metrics: MetricLike | None = None,
    metric_inputs: MetricInputs | None = None,
    parity: Tolerance = ExportOptions.parity,
    batch: Batch = ExportOptions.batch,
    latency_runs: PositiveInt = ExportOptions.latency_runs,
    latency_threads: PositiveInt = ExportOptions.latency_threads,
    merge_branches: bool = ExportOptions.merge_branches,
    inputs: Sequence[str] | None = ExportOptions.inputs,
) -> ExportReport:
    """Export a copy of ``model`` to a file, and verify the file in its runtime.

    The file is written beside its final place, loaded by its own runtime, compared with the model, evaluated, timed,
    and only then renamed; an older file of that name stays if anything fails. A report is written to ``{path}.json``.
    ``model`` is not changed: modes, buffers, gradients, hooks, device; nor are the random number generators of torch,
    NumPy and Python.

    Args:
        model: on any device, in any mode.
        example_inputs: a tensor, a tuple of positional inputs, a dict of keyword inputs, or an `ExampleInput` with
            both; the batch is the first dimension. What is not a tensor becomes a constant of the file; tensors become
            positional inputs, in the order of the signature of ``forward``.
        path: of the file; its suffix ``.ptl``, ``.pte``, ``.onnx`` or ``.pt2`` chooses the exporter.
        exporter: file format and runtime, if not the default for the suffix.
        data: batches ``(inputs, target)`` or inputs alone. The first four are compared in every output; all with a
            target are evaluated.
        metrics: a metric or collection of torchmetrics, updated with (outputs, target), for the model and for the file.
        metric_inputs: (outputs, batch) -> arguments of the metrics' ``update``, if they are others.
        parity: see `ExportOptions`.
        batch: see `ExportOptions`.
        latency_runs: see `ExportOptions`.
        latency_threads: see `ExportOptions`.
        merge_branches: see `ExportOptions`.
        inputs: see `ExportOptions`.

    Raises:
        ValueError: ``inputs`` has a name that is not in the example, or lacks an input that changes the outputs.
        TraceError: the format cannot express the model, or the file would have no inputs, or constant outputs.
        ParityError: the outputs of the file differ from the model's, the file does not run, or a batch of ``data``
            lacks one of its inputs.
        UnsupportedError: the format or its runtime is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_model(model, torch.randn(4, 3, 8, 8), f"{folder}/model.ptl", latency_runs=5)
        >>> report.inputs, report.macs, report.details["batch_norms_left"]
        ([{'name': 'input', 'shape': [1, 3, 8, 8], 'dtype': 'float32'}], 18944, 0)
    """
    warn_of_float_file(model)
    batches = iter(data)
    compared = list(itertools.islice(batches, _PARITY_BATCHES))
    evaluator = DataEvaluator(model, itertools.chain(compared, batches), metrics, metric_inputs) if compared else None
    options = ExportOptions(exporter, parity, batch, latency_runs, latency_threads, merge_branches, inputs)
    calls = [example_of_batch(one, model) for one in compared]
    return export_verified(model, ExampleInput.of(example_inputs), path, options, calls, lambda details: evaluator)


def export_verified(
    model: nn.Module,
    example: ExampleInput,
    path: str | os.PathLike[str],
    options: ExportOptions,
    calls: Sequence[ExampleInput],
    evaluator: Callable[[dict[str, Any]], Evaluator | None],
) -> ExportReport:
    """Export and verify, as `export_model` does.

    Args:
        model: see `export_model`.
        example: an example call.
        path: see `export_model`.
        options: all options.
        calls: real calls to compare the outputs of.
        evaluator: details of the written file -> what computes its metrics; None for no metrics.
    """
    exporter = options.for_path(path)
    exporter.check()
    with plain_execution(), atomic_write(Path(path)) as part:
        reference, given = _reference(model, cloned(example), options)
        example = given if options.batch == "as_given" else first_sample(given)
        calls = [reference.only(call, options.inputs) for call in calls]
        tensors = reference.tensors(example)
        network, merged = merged_copy(model, example) if options.merge_branches else (detached_copy(model), {})
        cost = count_cost(network, example.args, example.kwargs) if merged else None  # `write` may change the network
        copy = Positional(network, example, given if options.batch == "any" else None, reference.kept)
        details = {**exporter.write(copy, reference.tensors(cloned(example)), part), "merged_branches": merged}
        check_details(repr(exporter), model, details)
        with torch_threads(options.latency_threads):
            run = exporter.load(part)
        compared = _calls([given, *(calls or [altered(given)])], options.batch, exporter.largest_batch)
        parity = _compare(reference, run, compared, options, details.get("output_scales"))
        metrics = evaluator(details)
        evaluation = None
        if metrics is not None:
            limit = None if options.batch == "as_given" else 1 if options.batch == "one" else exporter.largest_batch
            structure = reference(*reference.tensors(cloned(example)))
            file = ExportedNetwork(reference, run, structure, limit, str(path), options.inputs)
            evaluation = metrics(ReferenceNetwork(reference, options.inputs), file, reference)
        latency = measure_latency(lambda: run(*tensors), runs=options.latency_runs, threads=options.latency_threads)
        cost = cost or count_cost(reference.model, example.args, example.kwargs)
        report = ExportReport(
            file=str(path),
            exporter=repr(exporter),
            runtime=exporter.runtime(),
            bytes=file_bytes(part),
            deflated_bytes=deflated_bytes(part),
            params=cost.params,
            macs=cost.macs,
            latency=latency,
            parity=parity,
            parity_batches=len(calls),
            tolerance=options.parity,
            inputs=_described(reference, tensors),
            built_in={name: repr(value) for name, value in reference.constants.items()},
            batch=options.batch,
            details=details,
            evaluation=evaluation,
        )
    report.write(f"{path}.json")
    return report


def verify_exported(
    model: nn.Module,
    example: ExampleInput,
    path: str | os.PathLike[str],
    options: ExportOptions,
    scales: list[float] | None = None,
) -> Parity:
    """Run a file in its runtime, and compare its outputs with those of ``model``, as an export does.

    Args:
        model: see `export_model`.
        example: an example call.
        path: of the file.
        options: those of the export.
        scales: of an int8 file, as in `compare_outputs`.

    Raises:
        ParityError: the outputs differ, or the file does not run with the inputs of ``model``.
        UnsupportedError: the format or its runtime is not installed.
    """
    exporter = options.for_path(path)
    exporter.check()
    with plain_execution():
        reference, given = _reference(model, cloned(example), options)
        run = exporter.load(Path(path))
        calls = _calls([given, altered(given)], options.batch, exporter.largest_batch)
        return _compare(reference, run, calls, options, scales)


def _reference(model: nn.Module, example: ExampleInput, options: ExportOptions) -> tuple[Positional, ExampleInput]:
    """Return a copy of the model that takes the inputs of the file, and the example with what they need."""
    whole = Positional(detached_copy(model), example)
    if options.inputs is not None:
        _check_names(whole, options.inputs)
        example = whole.only(example, options.inputs)
        whole = Positional(whole.model, example)
    one = example if options.batch == "as_given" else first_sample(example)
    kept = needed = needed_inputs(whole, one, any_batch=options.batch == "any")
    if options.inputs is not None:
        kept = {place for place in whole.places if any(is_within(place, name) for name in options.inputs)}
        if missing := sorted(needed - kept):
            raise ValueError(
                f"`inputs={list(options.inputs)}`: expected all inputs that the outputs are computed from, found that "
                f"{', '.join(missing)} is not among them, and has no default in `forward`. Add it, or give it one."
            )
    return Positional(whole.model, one, keep=kept), example


def _check_names(model: Positional, inputs: Sequence[str]) -> None:
    if unknown := [name for name in inputs if not any(is_within(place, name) for place in model.places)]:
        raise ValueError(
            f"`inputs={list(inputs)}`: expected inputs of `{type(model.model).__name__}.forward` that the example has "
            f"({', '.join(model.places)}), found {', '.join(unknown)}."
        )


def _calls(given: list[ExampleInput], batch: Batch, largest: int | None) -> list[ExampleInput]:
    """Select the compared calls: whole batches, at least one of one sample and one of several; or single samples."""
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
    reference: Positional,
    run: Callable[..., Any],
    calls: list[ExampleInput],
    options: ExportOptions,
    scales: list[float] | None,
) -> Parity:
    for call in calls:
        if (misfit := reference.misfit(call)) is not None:
            raise ParityError(
                f"The exported file and a batch: {misfit}. Export an example with the same inputs, or choose the "
                "file's with `inputs=[...]`."
            )
    running: list[ExampleInput] = []

    def run_model(call: ExampleInput) -> Any:
        running[:] = [call]
        call = cloned(call)
        return reference.model(*call.args, **call.kwargs)

    def run_file(call: ExampleInput) -> Any:
        try:
            return run(*reference.tensors(cloned(call)))
        except Exception as error:  # each runtime has its own exceptions
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ParityError(
                f"The exported file, run on {batch_size(call)} samples: expected it to run as the model does, found "
                f"{type(error).__name__}: {reason}. {_ADVICE[options.batch]}"
            ) from error

    try:
        sized = [(batch_size(call) or 1, call) for call in calls]
        return compare_outputs(run_model, run_file, sized, options.parity, scales)
    except ParityError as error:
        if running and (varying := reference.variation(running[0])):
            raise ParityError(
                f"{error} This batch has values that are constants of the file: {varying}. Give them as tensors, or "
                "export a module that sets them."
            ) from error
        raise


def _described(reference: Positional, tensors: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [
        {"name": name + place, "shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
        for name, value in zip(reference.names, tensors, strict=True)
        for place, leaf in named_leaves(in_order(value))
    ]
