"""Keep the ranks of a distributed run identical: refusals, broadcasts, reductions, and comparison by digest."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_light.errors import LightningLightError, RankMismatchError, UnsupportedError
from lightning_light.host.classes import loaded_hosts
from lightning_light.host.trainer import returns_weights, shards_parameters, start_method
from lightning_light.terminal import above_progress_bar

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

T = TypeVar("T")

_LOGGED: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()
_REPLACES_LAYERS = ("TransformerEnginePrecision", "BitsandbytesPrecision")


def refuse_sharding(trainer: Trainer, method: str, reason: str, remedy: str) -> None:
    """Refuse a strategy that shards or owns the parameters.

    Args:
        trainer: the Trainer, in ``setup`` or later.
        method: the callback's name as the user wrote it.
        reason: why the method needs whole parameters.
        remedy: what to do instead: a sentence.

    Raises:
        UnsupportedError: the strategy is FSDP, ModelParallel, DeepSpeed, or one like them.
    """
    if shards_parameters(trainer):
        raise UnsupportedError(
            f"`{method}` with `{type(trainer.strategy).__name__}`: expected a strategy that leaves parameters whole "
            f"(one device, or 'ddp'), because {reason}; found one that shards or owns them. {remedy}"
        )


def refuse_unsupported(trainer: Trainer, method: str) -> None:
    """Refuse strategies, launchers and precision plugins that cannot follow a structural change during a run.

    Args:
        trainer: the Trainer, in ``setup`` or later.
        method: the callback's name as the user wrote it.

    Raises:
        UnsupportedError: the strategy shards or owns the parameters (FSDP, ModelParallel, DeepSpeed), the launcher
            loads the weights into a process with the old shapes (spawn, fork, notebook), or the precision plugin
            replaces layers. The message contains an alternative.
    """
    refuse_sharding(
        trainer,
        method,
        "shapes change during a run",
        "Compress on one device or with `strategy='ddp'` first, then load the small network and shard that.",
    )
    if returns_weights(trainer):
        raise UnsupportedError(
            f"`{method}` with processes started by '{start_method(trainer)}': expected a launcher that starts the "
            "script again for each process, found one that finally loads the small weights into a main process that "
            "still has the old shapes. Use `strategy='ddp'` in a script; in a notebook, one device."
        )
    plugin = {cls.__name__ for cls in type(trainer.precision_plugin).__mro__}
    if plugin.intersection(_REPLACES_LAYERS):
        raise UnsupportedError(
            f"`{method}` with `{type(trainer.precision_plugin).__name__}`: expected torch's own layers, found a "
            "precision plugin that replaces them. Use a plain precision, such as 'bf16-mixed', while compressing."
        )


def broadcast(trainer: Trainer, decision: T) -> T:
    """Return the value of rank 0 on every rank."""
    return trainer.strategy.broadcast(decision, src=0)


def on_rank_zero(trainer: Trainer, function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0, and return its result, or raise its error of this package, on every rank."""
    outcome: T | LightningLightError | None = None
    if trainer.is_global_zero:
        try:
            outcome = function()
        except LightningLightError as error:
            outcome = error
    outcome = broadcast(trainer, outcome)
    if isinstance(outcome, LightningLightError):
        raise outcome
    return cast("T", outcome)


def reduce_mean(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the mean of ``tensor`` over all ranks, as a new tensor."""
    mean = trainer.strategy.reduce(tensor.detach().clone(), reduce_op="mean")
    assert isinstance(mean, Tensor)  # a tensor in, a tensor out
    return mean


def reduce_gradients(trainer: Trainer, parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients of parameters that DDP does not know by their mean over all ranks; none counts as zero."""
    known = list(parameters)
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in known]
    if known:
        vector_to_parameters(reduce_mean(trainer, parameters_to_vector(gradients)), gradients)
    for parameter, gradient in zip(known, gradients, strict=True):
        parameter.grad = gradient


def reduce_ranges(trainer: Trainer, ranges: Tensor, widest: Tensor) -> Tensor:
    """Return the mean over all ranks of ``ranges``, ``(n, 2)``, or the widest one where ``widest``, ``(n,)``."""
    outward = ranges.new_tensor([-1.0, 1.0])
    largest = trainer.strategy.reduce(ranges.detach() * outward, reduce_op="max")
    assert isinstance(largest, Tensor)  # a tensor in, a tensor out
    return torch.where(widest.to(ranges.device)[:, None], largest * outward, reduce_mean(trainer, ranges))


def check_agreement(trainer: Trainer, what: str, value: Any) -> None:
    """Compare ``value`` over all ranks, by digest. Every rank has to call it.

    Args:
        trainer: the Trainer.
        what: what is compared, for the message: "the channels to remove".
        value: plain types and tensors.

    Raises:
        RankMismatchError: on every rank, if two of them differ.
    """
    if trainer.world_size == 1 or not dist.is_initialized():
        return
    digests: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(digests, digest(value))
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(digests):
        ranks.setdefault(found, []).append(rank)
    if len(ranks) > 1:
        raise RankMismatchError(
            f"Expected {what} to be the same on all {trainer.world_size} ranks, found {len(ranks)} versions, held by "
            f"ranks {list(ranks.values())}. A decision must not depend on rank-local data or random numbers: reduce "
            "what it is based on, or let rank 0 decide and broadcast."
        )


def digest(value: Any) -> str:
    """Return the SHA-256 of plain types and tensors, equal for equal values on every machine."""
    found = hashlib.sha256()
    for piece in _pieces(value):
        found.update(piece)
    return found.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=repr):
            yield repr(key).encode()
            yield from _pieces(value[key])
    elif isinstance(value, list | tuple):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    else:
        yield json.dumps(value).encode()


def log_rank_zero(trainer: Trainer, sentence: str, level: int = logging.INFO, *, once: bool = False) -> None:
    """Log one line on rank 0 through the host's logger, beside Lightning's own, above the progress bar.

    Args:
        trainer: the Trainer.
        sentence: the line.
        level: of `logging`.
        once: log the same line of one Trainer at the level ``DEBUG`` when it is repeated.
    """
    if not trainer.is_global_zero:
        return
    logged = _LOGGED.setdefault(trainer, set())
    if once and sentence in logged:
        level = logging.DEBUG
    logged.add(sentence)
    modules = [cls.__module__ for cls in type(trainer).__mro__]
    host = next((host for host in loaded_hosts() if any(name.startswith(f"{host}.") for name in modules)), "")
    logger = logging.getLogger(f"{host}.lightning_light".lstrip("."))
    with above_progress_bar(logger):
        logger.log(level, sentence)
