"""Try every method on published networks with random weights: does it work, is it refused, or is it wrong?

    pip install timm transformers segmentation-models-pytorch torchvision
    python benchmarks/zoo.py results.jsonl [--columns prune torch-pruning ...] [--networks timm/resnet18 ...]
    python benchmarks/zoo.py results.jsonl --table

Each network runs in a process of its own with a limit on its process time; the results are appended to a file of JSON
lines, and what is in it is not run again (``--again`` repeats what did not work). ``--quick`` takes the networks that
need no further package.

Columns: ``prune`` removes half of all channels that can be removed, then nine tenths, at random, and checks in double
precision that the network equals the original in which everything that was removed is zero; it works if 60 % of the
multiply-accumulates can be reached. Of ``torch-pruning`` 23 % of the channels are removed, and the result only has to
run, to give outputs of the same shapes, and to be smaller. ``mask``,
``factor`` and ``quantize`` have to change what they promise and give finite outputs; the exports have to pass the
comparison of the written file with the network, float or int8.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import json
import math
import multiprocessing
import os
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo_networks import NETWORKS, QUICK, Network

import lightning_light as ll
from lightning_light.dependency import DependencyGraph, trace_dependencies
from lightning_light.errors import LightningLightError
from lightning_light.example_input import ExampleInput
from lightning_light.nested import map_tensors, tensors_in
from lightning_light.surgery.edit import cut

REMAINING = 0.6
PACKAGES = {
    "timm/": ["timm"],
    "torchvision/": ["torchvision.models"],
    "segmentation/": ["segmentation_models_pytorch"],
    "transformers/": ["transformers.modeling_utils", "transformers.models.bert.modeling_bert"],
    "audio/": ["transformers.modeling_utils"],
}

Result = dict[str, Any]


class WrongError(AssertionError):
    """The compressed network is not what it has to be."""


# Exactness.


class FreeOfCounts(TorchFunctionMode):
    """Compute means as sums, and softmax as a quotient by the sum of magnitudes.

    A zero then contributes nothing to a mean over channels, a norm, or a softmax over channels, and the temperature of
    attention does not matter: a network without some channels computes what it would compute with zeros in them.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, or its replacement."""
        replacement = REPLACEMENTS.get(function)
        with torch._C.DisableTorchFunction():
            return (replacement or function)(*args, **(kwargs or {}))


@contextmanager
def constant_temperature() -> Iterator[None]:
    """Let the square root of a Python number be one: where it divides scores to which a bias is added."""
    sqrt = math.sqrt
    math.sqrt = lambda number: 1.0
    try:
        yield
    finally:
        math.sqrt = sqrt


def normalized(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x * (x.square().sum(tuple(dims), keepdim=True) + 1e-5).rsqrt()


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return affine(normalized(x, range(-len(shape), 0)), weight, bias)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Tensor:
    return layer_norm(x, shape, weight)


def group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    parts = x.reshape(x.shape[0], groups, -1)
    spread = [1, -1] + [1] * (x.dim() - 2)
    vectors = [None if vector is None else vector.reshape(spread) for vector in (weight, bias)]
    return affine(normalized(parts, (-1,)).view(x.shape), *vectors)


def batch_norm(
    x: Tensor,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *options: Any,
    **_: Any,
) -> Tensor:
    """In training mode, as weights are standardized by it, without a count of what is normalized."""
    if not training:
        return F.batch_norm(x, mean, var, weight, bias, training, *options, **_)
    spread = [1, -1] + [1] * (x.dim() - 2)
    vectors = [None if vector is None else vector.reshape(spread) for vector in (weight, bias)]
    return affine(normalized(x, [dim for dim in range(x.dim()) if dim != 1]), *vectors)


def softmax(x: Tensor, dim: int = -1, *_: Any, **__: Any) -> Tensor:
    x = torch.where(x < -1e4, 0.0, x)  # masked
    return x / (x.abs().sum(dim, keepdim=True) + 1e-12)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *_: Any, **options: Any) -> Tensor:
    mask = options.get("attn_mask", mask)
    if options.get("enable_gqa"):
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.transpose(-1, -2)
    if options.get("is_causal"):
        scores = scores.tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, 0.0) if mask.dtype == torch.bool else scores + mask
    return softmax(scores) @ v


def mean(x: Tensor, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
    dim = options.pop("axis", dim)
    return x.sum(**options) if dim is None else x.sum(dim, keepdim, **options)


def variance(x: Tensor, dim: Any = None, *_: Any, keepdim: bool = False, **__: Any) -> Tensor:
    return x.square().sum() if dim is None else x.square().sum(dim, keepdim)


def product(x: Any, other: Any) -> Any:
    """Multiply, but not by the temperature of attention: one over the square root of a count."""
    count = other**-2 if isinstance(other, float) and 0.0 < other < 1.0 else 0.5
    return x if abs(count - round(count)) < 1e-6 else x * other


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), product),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), rms_norm),
    **dict.fromkeys((F.group_norm,), group_norm),
    **dict.fromkeys((F.batch_norm,), batch_norm),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), softmax),
    **dict.fromkeys((F.scaled_dot_product_attention,), attention),
    **dict.fromkeys((torch.mean, Tensor.mean), mean),
    **dict.fromkeys((torch.sqrt, Tensor.sqrt), lambda x: x.sqrt() if x.dim() else torch.ones_like(x)),
    **dict.fromkeys((torch.var, Tensor.var), variance),
    **dict.fromkeys((torch.std, Tensor.std), lambda *args, **options: variance(*args, **options).sqrt()),
    **dict.fromkeys(
        (torch.var_mean,), lambda x, *args, **options: (variance(x, *args, **options), x.sum(*args, **options) * 0)
    ),
}


@torch.no_grad()
def silence(model: nn.Module, graph: DependencyGraph, kept: dict[str, Tensor]) -> None:
    """Set everything that a cut removes to zero."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in graph.groups:
        for member in group.members if group.name in kept else ():
            removed = member.index[~kept[group.name]].reshape(-1)
            tensors[member.tensor].data.index_fill_(member.dim, removed, 0.0)


def outputs(model: nn.Module, example: ExampleInput) -> list[Tensor]:
    with torch.no_grad():
        torch.manual_seed(1)
        return [x for x in tensors_in(model(*example.args, **example.kwargs), objects=True) if x.is_floating_point()]


def check_exact(model: nn.Module, example: ExampleInput, graph: DependencyGraph, kept: dict[str, Tensor]) -> nn.Module:
    """Compare the network without channels, which is returned, with the one in which they are zero."""
    small, zeroed = copy.deepcopy(model), copy.deepcopy(model)
    cut(small, graph.kept_positions(kept), attributes=graph.attributes(small, kept))
    silence(zeroed, graph, kept)
    try:
        with FreeOfCounts(), constant_temperature():
            found, expected = outputs(small, example), outputs(zeroed, example)
    except Exception as error:
        raise WrongError(f"does not run after the cut: {type(error).__name__}: {error}") from error
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise WrongError(f"outputs have shapes {[tuple(x.shape) for x in found]}")
    for one, other in zip(found, expected, strict=True):
        error = float((one - other).abs().max() / other.abs().max().clamp(min=1e-12)) if other.numel() else 0.0
        if not error < 1e-6:
            raise WrongError(f"outputs differ by {error:.1e} of the largest")
    return small


# Columns: each returns a short detail, or raises.


def built(network: Network, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ExampleInput]:
    """A network, whose batch norms do something, and its example."""
    torch.manual_seed(0)
    model, args, kwargs = network.build()
    model = model.to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0.0, 0.3)
    return model, ExampleInput(*map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)))


@functools.cache
def traced(network: Network) -> tuple[nn.Module, ExampleInput, DependencyGraph, float]:
    """The network in double precision, its example, its dependency graph, and how many seconds that took."""
    model, example = built(network, torch.float64)
    started = time.process_time()
    graph = trace_dependencies(model, example.args, example.kwargs)
    return model, example, graph, time.process_time() - started


def prune(network: Network) -> Result:
    """Remove channels: half of them at random, then nine tenths."""
    model, example, graph, seconds = traced(network)
    free = [group for group in graph.groups if group.reason is None and group.width > 1]
    generator = torch.Generator().manual_seed(0)
    small = model
    for share, fewest in ((0.5, 1), (0.1, 2)):
        kept = {group.name: torch.rand(group.width, generator=generator) < share for group in free}
        for mask in kept.values():
            mask[torch.randperm(mask.numel(), generator=generator)[:fewest]] = True
        small = check_exact(model, example, graph, kept)
    left = ll.MACs(1.0).measure(small, example) / ll.MACs(1.0).measure(model, example)
    counted = Counter(group.reason for group in graph.groups if any(member.role == "out" for member in group.members))
    reasons = [f"{count} x {reason}" for reason, count in counted.most_common() if reason]
    detail = f"down to {left:.2f} of the MACs" + ("" if left <= REMAINING else f"; kept: {'; '.join(reasons)}")
    outcome = "works" if left <= REMAINING else "refused"
    return {"tracing": seconds, "least": left, "outcome": outcome, "detail": detail}


def theirs(network: Network) -> Result:
    """Remove channels with torch-pruning, which is given the layers that produce the output."""
    graph = traced(network)[2]
    makers = {g.name.partition("#")[0].partition("/")[0] for g in graph.groups if "model output" in (g.reason or "")}
    model, example = built(network)
    before = [x.shape for x in outputs(model, example)]
    dense = sum(parameter.numel() for parameter in model.parameters())
    modules = dict(model.named_modules())
    started = time.process_time()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example.kwargs or example.args,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1.0 - REMAINING**0.5,
        ignored_layers=[modules[name] for name in makers if name in modules],
        in_channel_groups={},
        out_channel_groups={},
    )
    seconds = time.process_time() - started
    pruner.step()
    if [x.shape for x in outputs(model, example)] != before:
        raise WrongError("outputs have other shapes")
    left = sum(parameter.numel() for parameter in model.parameters()) / dense
    if left > 0.99:
        raise WrongError("nothing is removed")
    return {"tracing": seconds, "detail": f"{left:.2f} of the parameters"}


def mask(network: Network) -> Result:
    """Masks on 80 % of the weights."""
    model, example = built(network)
    expected = outputs(model, example)
    masks = ll.prune_weights(model, example, ll.Sparsity(0.8))
    check_finite(outputs(model, example), expected)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    return {"detail": f"{sum(int((~m).sum()) for m in masks.values()) / weights:.2f} of the weights are zero"}


def factor(network: Network) -> Result:
    """Low-rank factors for 75 % of the parameters."""
    model, example = built(network)
    expected = outputs(model, example)
    before = sum(parameter.numel() for parameter in model.parameters())
    ll.factorize(model, example, ll.Params(0.75))
    check_finite(outputs(model, example), expected)
    return {"detail": f"{sum(parameter.numel() for parameter in model.parameters()) / before:.2f} of the parameters"}


def quantize(network: Network) -> Result:
    """Eight bits, fake-quantized, with gradients."""
    model, example = built(network)
    expected = outputs(model, example)
    ll.quantize(model, example, ll.Int8(), progress_bar=False)
    with ll.fake_quantized(model):
        found = outputs(model, example)
        results = tensors_in(model(*example.args, **example.kwargs), objects=True)
        losses = [x.float().square().mean() for x in results if x.requires_grad]
        torch.stack(losses).sum().backward()
    check_finite(found, expected)
    quantized = any(bool((x != y).any()) for x, y in zip(found, expected, strict=True))
    return {"detail": "outputs differ from float" if quantized else "nothing is quantized"}


def check_finite(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise WrongError("outputs have other shapes")
    if any(not bool(x.isfinite().all()) for x, y in zip(found, expected, strict=True) if bool(y.isfinite().all())):
        raise WrongError("outputs are not finite")


def exported(suffix: str, *, int8: bool) -> Callable[[Network], Result]:
    def column(network: Network) -> Result:
        """Write a file, which is compared with the network in its runtime."""
        model, example = built(network)
        if int8:
            ll.quantize(model, example, ll.Int8(), progress_bar=False)
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        with tempfile.TemporaryDirectory() as folder, ll.fake_quantized(model) if int8 else nullcontext():
            report = ll.export_model(model, example, f"{folder}/net{suffix}", latency_runs=1)
        return {"detail": f"{report.bytes / 1e6:.2f} MB, {report.bytes / weights:.2f} of the float weights"}

    return column


COLUMNS: dict[str, Callable[[Network], Result]] = {
    "prune": prune,
    "torch-pruning": theirs,
    "mask": mask,
    "factor": factor,
    "quantize": quantize,
    **{
        f"{name}, {'int8' if int8 else 'float'}": exported(suffix, int8=int8)
        for suffix, name in ((".ptl", "TorchScript"), (".onnx", "ONNX"), (".pte", "ExecuTorch"))
        for int8 in (False, True)
    },
}


# Running.


def cell(network: Network, column: str) -> Result:
    """Run one column on one network: its outcome is worked, refused, wrong, or failed."""
    started = time.process_time()
    try:
        result = {"outcome": "works", **COLUMNS[column](network)}
    except WrongError as error:
        result = {"outcome": "failed" if column == "torch-pruning" else "wrong", "detail": str(error)}
    except LightningLightError as error:
        result = {"outcome": "refused", "detail": f"{type(error).__name__}: {error}"}
    except Exception as error:  # noqa: BLE001 - any error of a network or a method is a result
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        result = {"outcome": "failed", "detail": f"{type(error).__name__}: {error} ({where})"}
    return {**result, "seconds": time.process_time() - started}


def import_packages(names: Sequence[str]) -> None:
    """Import what the networks need once, since their processes are forked."""
    for prefix, packages in PACKAGES.items():
        if any(name.startswith(prefix) for name in names):
            for package in packages:
                importlib.import_module(package)


def _child(network: Network, columns: Sequence[str], limit: float, pipe: Any) -> None:
    os.nice(5)
    warnings.filterwarnings("ignore")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for column in columns:
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + limit), hard))
            pipe.send((column, cell(network, column)))


def run(name: str, network: Network, columns: Sequence[str], limit: float) -> Iterator[Result]:
    """Run ``columns`` on one network in a process of its own, and yield a result for each."""
    context = multiprocessing.get_context("fork")
    waiting = list(columns)
    while waiting:
        ours, child = context.Pipe()
        process = context.Process(target=_child, args=(network, waiting, limit, child))
        process.start()
        child.close()
        try:
            while waiting:
                column, result = ours.recv()
                waiting.remove(column)
                yield {"network": name, "family": network.family, "column": column, **result}
        except EOFError:
            detail = f"no result within {limit:g} s of process time, or the process was killed"
            ended = {"outcome": "failed", "detail": detail, "seconds": limit}
            yield {"network": name, "family": network.family, "column": waiting.pop(0), **ended}
        finally:
            process.kill()
            process.join()


def stored(path: Path) -> dict[tuple[str, str], Result]:
    """The last result of every cell in a file."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {(result["network"], result["column"]): result for result in results}


# The table.


def table(results: Sequence[Result]) -> str:
    """Summarize by family and column: works / refused / wrong / failed."""
    columns = [column for column in COLUMNS if any(result["column"] == column for result in results)]
    families = list(dict.fromkeys(result["family"] for result in results))
    lines = ["| family | networks | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for family in [*families, "all"]:
        mine = [result for result in results if family in (result["family"], "all")]
        count = len({result["network"] for result in mine})
        cells = [_counts([result for result in mine if result["column"] == column]) for column in columns]
        lines.append(f"| {family} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _counts(results: Sequence[Result]) -> str:
    found = Counter(result["outcome"] for result in results)
    return " / ".join(str(found[outcome]) for outcome in ("works", "refused", "wrong", "failed")) if results else ""


def failures(results: Sequence[Result]) -> str:
    """List what does not work, with the reason."""
    lines = ["| network | column | outcome | reason |", "|---|---|---|---|"]
    for result in results:
        if result["outcome"] != "works":
            detail = " ".join(str(result["detail"]).split())[:160].replace("|", "\\|")
            lines.append(f"| {result['network']} | {result['column']} | {result['outcome']} | {detail} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for, or print the table of what is stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--columns", nargs="*", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--networks", nargs="*", help="names, or parts of them")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="repeat what did not work")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of process time per cell")
    parser.add_argument("--table", action="store_true", help="print what is stored, and run nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    networks = QUICK if given.quick else NETWORKS
    chosen = [name for name in networks if not given.networks or any(part in name for part in given.networks)]
    import_packages([] if given.table else chosen)
    for name in chosen if not given.table else ():
        known = {} if given.again else stored(given.results)
        works = {key for key, result in stored(given.results).items() if result["outcome"] == "works"}
        columns = [c for c in given.columns if (name, c) not in known and (name, c) not in works]
        for result in run(name, networks[name], columns, given.limit):
            with given.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{name}, {result['column']}: {result['outcome']}, {result.get('detail', '')}"[:200], flush=True)
    results = [result for result in stored(given.results).values() if result["network"] in networks]
    print(table(results), failures(results), sep="\n\n")


if __name__ == "__main__":
    main()
