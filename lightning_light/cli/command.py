"""Parse the command line, and run the command."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_light.cli.errors import command_line, write_warnings
from lightning_light.cli.sentences import with_sentences
from lightning_light.errors import LightningLightError, UnsupportedError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]

_CHECKPOINT = "checkpoint of Lightning, compressed or not"
_MODULE = "class of the LightningModule, as package.module:MyModule"
_TOLERANCES = ("absolute", "relative", "quant_steps", "outliers")
_EXAMPLE = (
    "shape of each input, as 1,3,32,32 or 1,128:int64; by default the module's `example_input_array`, else the example "
    "that the checkpoint holds"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status: 0, 1 for an error, 2 for wrong arguments.

    Args:
        arguments: of the command; those of the process by default.
    """
    options: list[str] = []
    try:
        given = vars(_parser().parse_args(arguments))
        command = given["command"]
        options = _options(command)
        sys.path.insert(0, os.getcwd())  # classes of the user, as `python -m` finds them
        module = importlib.import_module(f"lightning_light.cli.{_COMMANDS[command].module}")  # `--help` needs no torch
        with write_warnings(options):
            getattr(module, command)(**vars(given[command]))
    except (LightningLightError, OSError) as error:
        sys.stderr.write(f"lightning-light: {command_line(str(error), options)}\n")
        return 1
    return 0


def _options(command: str) -> list[str]:
    names: list[str] = []
    _COMMANDS[command].add_arguments(lambda *flags, **_: names.append(flags[-1]))
    return [name.removeprefix("--") for name in names if name.startswith("--")]


def _parser() -> ArgumentParser:
    try:
        import jsonargparse
        import rich  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"`lightning-light`: expected the packages jsonargparse and rich, found that one cannot be imported "
            f"({error}). Install them: `pip install lightning-light[cli]`."
        ) from error
    parser_class = with_sentences(jsonargparse.ArgumentParser)
    parser: ArgumentParser = parser_class(
        prog="lightning-light", description="Inspect, compare, export and measure compressed networks."
    )
    commands = parser.add_subcommands(dest="command", title="commands")
    for name, command in _COMMANDS.items():
        subparser = parser_class(description=command.summary)
        command.add_arguments(subparser.add_argument)
        commands.add_subcommand(name, subparser, help=command.summary)
    return parser


# The arguments of each command.

_Add = Callable[..., Any]


def _inspect(add: _Add) -> None:
    add("checkpoint", type=str, help=_CHECKPOINT)


def _diff(add: _Add) -> None:
    add("before", type=str, help=_CHECKPOINT)
    add("after", type=str, help="another one")


def _report(add: _Add) -> None:
    add("checkpoint", type=str, help=_CHECKPOINT)
    add("-o", "--out", type=str, default="report.html", help="path of the page; the JSON is written beside it")


def _benchmark(add: _Add) -> None:
    from jsonargparse.typing import PositiveInt

    add("files", nargs="+", type=str, help="exported files, each with its report beside it")
    add("--threads", type=PositiveInt, default=1, help="threads of the runtimes")
    add("--runs", type=PositiveInt, default=50, help="timed calls of each file")


def _verify(add: _Add) -> None:
    from jsonargparse.typing import NonNegativeFloat

    add("file", type=str, help="exported file, with its report beside it")
    add("--against", type=str, required=True, help=_CHECKPOINT)
    add("--module", type=str, required=True, help=_MODULE)
    add("--example", nargs="+", type=str, help=_EXAMPLE)
    for name in _TOLERANCES:
        add(f"--{name}", type=NonNegativeFloat, help="tolerance; by default that of the export")


def _export(add: _Add) -> None:
    from jsonargparse.typing import NonNegativeFloat

    add("checkpoint", type=str, help=_CHECKPOINT)
    add("--to", type=str, required=True, help="path of the file, which ends in .ptl, .pte, .onnx or .pt2")
    add("--module", type=str, required=True, help=_MODULE)
    add("--example", nargs="+", type=str, help=_EXAMPLE)
    add("--batch", choices=["any", "one", "as_given"], help="sizes of batches that the file is verified with")
    add("--inputs", nargs="+", type=str, help="inputs of the file; by default all that the outputs are computed from")
    add("--merge_branches", type=bool, default=True, help="merge blocks of parallel branches")
    add("--float", action="store_true", help="export a quantized network in float")
    for name in _TOLERANCES:
        add(f"--{name}", type=NonNegativeFloat, help="tolerance of the verification")


def _convert(add: _Add) -> None:
    from jsonargparse.typing import PositiveInt

    add("checkpoint", type=str, help=_CHECKPOINT)
    add("--to", type=str, required=True, help="path of the new checkpoint")
    add("--module", type=str, required=True, help=_MODULE)
    add("--macs", type=float, help="fraction that remains of the multiply-accumulates before any compression")
    add("--params", type=float, help="fraction that remains of the parameters before any compression")
    add("--energy", type=float, help="fraction of each layer's energy that remains")
    add("--ratio", type=float, help="fraction of each layer's full rank")
    add("--evbmf", action="store_true", help="ranks above the noise level of each layer")
    add("--merge", action="store_true", help="merge the branches of `Reparameterization` instead")
    forms = ["auto", "channel", "spatial", "tucker2", "depthwise"]
    add("--form", choices=forms, help="form of factorized convolutions")
    add("--round_to", type=PositiveInt, help="multiple that ranks are rounded to")
    add("--targets", nargs="+", type=str, help="patterns of layers; all by default")
    add("--example", nargs="+", type=str, help=_EXAMPLE)


def _sensitivity(add: _Add) -> None:
    from jsonargparse.typing import PositiveInt

    add("checkpoint", type=str, help=_CHECKPOINT)
    add("--module", type=str, required=True, help=_MODULE)
    add(
        "--data",
        type=str,
        help="class of a LightningDataModule, or a function that returns batches, as package.module:MyData; by default "
        "the module's own `val_dataloader`",
    )
    add("--batches", type=PositiveInt, default=4, help="number of batches that are used")
    add("--bits", nargs="+", type=int, default=[2, 3, 4, 6, 8], help="widths to measure")
    add("--distance", choices=["kl", "mse"], default="kl", help="of class scores, or of any other output")
    add(
        "-o",
        "--out",
        type=str,
        help="path of a JSON file: layer, bits, distance, weights and MACs, one row per measurement",
    )


class _Command(NamedTuple):
    module: str
    summary: str
    add_arguments: Callable[[_Add], None]


_COMMANDS = {
    "inspect": _Command(
        "checkpoints", "Show structure, history and owners of a checkpoint, without its class.", _inspect
    ),
    "benchmark": _Command("files", "Compare size and latency of exported files, each in its runtime.", _benchmark),
    "verify": _Command("files", "Run an exported file, and compare its outputs with those of the module.", _verify),
    "export": _Command("files", "Export a checkpoint to a file, and verify the file.", _export),
    "diff": _Command("checkpoints", "Show what changed between two checkpoints.", _diff),
    "report": _Command("checkpoints", "Write the report of a checkpoint as HTML and JSON.", _report),
    "sensitivity": _Command(
        "sensitivity", "Quantize one layer at a time, and measure the change of the outputs.", _sensitivity
    ),
    "convert": _Command("convert", "Factorize the layers of a finished checkpoint, or merge its branches.", _convert),
}
