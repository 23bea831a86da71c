"""Commands that write and run exported files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lightning_light.cli.errors import CommandError, as_command_error, expecting
from lightning_light.cli.modules import example_of, load_module, random_input, working
from lightning_light.errors import ParityError
from lightning_light.export import Exporter, ExportReport, Tolerance, export_model, load_exported
from lightning_light.export.formats import exporter_of
from lightning_light.export.functional import Batch, ExportOptions, verify_exported
from lightning_light.formatting import DataTable, human_bytes, human_milliseconds
from lightning_light.measure import LatencyStats, file_bytes, measure_latency
from lightning_light.measure.latency import torch_threads
from lightning_light.progress_bar import with_progress_bar
from lightning_light.quantization.checkpoint_state import METHOD, fake_quantized
from lightning_light.surgery.attachment import state_of

__all__ = ["benchmark", "export", "verify"]

_RUNNABLE = "a file that its runtime loads and runs"


def benchmark(files: Sequence[str], threads: int, runs: int) -> None:
    """Print size and latency of files side by side."""
    reports = [(_exporter(file), _report_of(file)) for file in files]
    found: list[LatencyStats] = []
    for file, (_, report) in with_progress_bar(zip(files, reports, strict=True), len(files), "benchmark", shown=True):
        found.append(_latency(file, report, threads, runs))
    lines = tuple(
        (
            file,
            exporter.runtime(),
            human_bytes(report.bytes),
            human_milliseconds(latency.median),
            f"{human_milliseconds(latency.p10)} to {human_milliseconds(latency.p90)}",
            f"{found[0].median / latency.median:.3g}x",
        )
        for file, (exporter, report), latency in zip(files, reports, found, strict=True)
    )
    note = f"latency per sample: median of {runs} calls, {threads} thread{'s' if threads > 1 else ''}, on this machine"
    headers = ("file", "runtime", "size", "latency", "p10 to p90", "speed")
    droppable = ("p10 to p90", "runtime")
    DataTable(headers, lines, notes=(note,), text_columns=frozenset({"runtime"}), droppable=droppable).write()


def verify(file: str, against: str, module: str, example: Sequence[str] | None, **tolerances: float | None) -> None:
    """Run a file, compare it with the module, and print the largest difference."""
    _exporter(file)
    report = _report_of(file)
    network = load_module(against, module)
    scales = report.details.get("output_scales")
    call = example_of(network, against, example)
    if scales is not None and not _quantization_of(network):
        raise CommandError(f"`{file}`: expected the quantized network that the file is of, found a float `{against}`.")
    int8 = nullcontext() if scales is None else fake_quantized(network)
    with expecting(file, f"{_RUNNABLE} as `{module}` does"), working(f"verifying {file}"), int8:
        options = ExportOptions(parity=_changed(report.tolerance, tolerances), batch=cast(Batch, report.batch))
        try:
            parity = verify_exported(network, call, file, options, scales)
        except ParityError as error:
            raise CommandError(
                f"`{file}` against `{against}`: {error} Or the file is of another checkpoint."
            ) from error
    steps = "".join(f", {name} {off:.3g} quantization steps" for name, off in parity.quant_steps.items())
    sys.stdout.write(
        f"{file} agrees with {against} in {_exporter(file).runtime()}: largest difference {parity.max_absolute:.1e}"
        f"{steps}, on {parity.samples} samples\n"
    )


def export(
    checkpoint: str,
    to: str,
    module: str,
    example: Sequence[str] | None,
    batch: Batch | None,
    inputs: Sequence[str] | None,
    merge_branches: bool,
    float: bool,
    **tolerances: float | None,
) -> None:
    """Export a checkpoint, and print the report of the file in one line."""
    _exporter(to).check()
    network = load_module(checkpoint, module)
    int8 = nullcontext() if float else _as_trained(network, checkpoint)
    call = example_of(network, checkpoint, example)
    with expecting(to, f"`{module}` to be exported"), working(f"exporting {to}"), int8:
        report = export_model(
            network,
            call,
            to,
            parity=_changed(ExportOptions.parity, tolerances),
            batch=batch or ExportOptions.batch,
            inputs=inputs,
            merge_branches=merge_branches,
        )
    sys.stdout.write(f"{report.summary()}\n")


def _changed(tolerance: Tolerance, given: Mapping[str, float | None]) -> Tolerance:
    return replace(tolerance, **{name: value for name, value in given.items() if value is not None})


def _as_trained(network: nn.Module, checkpoint: str) -> AbstractContextManager[Any]:
    """Return a context in which ``network`` is fake-quantized, if it was when the checkpoint was saved."""
    states = _quantization_of(network)
    if any(not state.get("enabled") for state in states):
        raise CommandError(
            f"`{checkpoint}`: expected a float or a quantized network, found one whose ranges were still being "
            "observed. Use a later checkpoint of the run, or export in float: `--float`."
        )
    return fake_quantized(network) if states else nullcontext()


def _quantization_of(network: nn.Module) -> list[dict[str, Any]]:
    return [state for method, state in state_of(network).state.items() if method.startswith(METHOD)]


def _exporter(file: str) -> Exporter:
    with as_command_error():
        return exporter_of(file, None)


def _report_of(file: str) -> ExportReport:
    """Read the report beside a file, and check that it is the file's."""
    size, path = file_bytes(file), Path(f"{file}.json")
    if not path.exists():
        raise CommandError(
            f"`{file}`: expected its report beside it, `{path}`, which every export of this package writes, found "
            "none. Copy it together with the file."
        )
    with expecting(str(path), "the report of an exported file", "Export again."):
        report = ExportReport.read(path)
    if report.bytes != size:
        raise CommandError(
            f"`{file}`: expected the file that its report describes, of {report.bytes} bytes, found one of {size} "
            "bytes. It is of another export, or damaged: export again."
        )
    return report


def _latency(file: str, report: ExportReport, threads: int, runs: int) -> LatencyStats:
    with expecting(file, _RUNNABLE), torch_threads(threads):
        inputs = [random_input(each["shape"], getattr(torch, each["dtype"])) for each in report.inputs]
        run = load_exported(file, batch="as_given")
        return measure_latency(lambda: run(*inputs), runs=runs, threads=threads)
