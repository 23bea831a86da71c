"""Continue a run with the random numbers and the training batches that it would have had without the interruption."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch.utils._pytree import tree_map_only

from lightning_light.errors import ManifestError
from lightning_light.host.trainer import is_restoring
from lightning_light.isolation import plain_execution

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["KEY", "RunPosition", "random_state", "set_random_state"]

KEY = "lightning_light_random_state"

_log = logging.getLogger(__name__)


def random_state() -> dict[str, Any]:
    """Return the states of the random generators of Python, NumPy, and torch, as plain types and tensors."""
    states = {
        "python": random.getstate(),
        "numpy": tree_map_only(numpy.ndarray, lambda key: key.tolist(), numpy.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(states: dict[str, Any]) -> None:
    """Restore what `random_state` has returned.

    >>> states = random_state()
    >>> first = torch.rand(2)
    >>> set_random_state(states)
    >>> torch.equal(first, torch.rand(2))
    True
    """
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class RunPosition:
    """Keep the random states and the position in the training data in checkpoints, and restore both.

    Lightning restores neither: a resumed run shuffles differently, draws other dropout masks, and, in the middle of an
    epoch, starts with the first batches again. A checkpoint has two states per rank: of the start of the epoch, and the
    current one. A run that is resumed at the end of an epoch starts from the current state. In the middle of an epoch,
    the loaders start from the state of the epoch start, the batches that were used are read and skipped, and training
    continues from the current state. Loaders with a ``state_dict`` restore their position themselves.
    """

    def __init__(self) -> None:
        self._first_epoch = 0
        self._epoch_start: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None

    def save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Add the states of every rank to ``checkpoint``."""
        own = {"used": _batches_used(trainer), "epoch_start": self._epoch_start, "current": random_state()}
        checkpoint[KEY] = _of_every_rank(trainer, own)

    def load(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Take this rank's states from ``checkpoint``, if it was saved by as many ranks.

        Raises:
            ManifestError: the states are damaged.
        """
        self._loaded = None
        try:
            ranks = checkpoint.get(KEY, [])
            if len(ranks) == trainer.world_size and (own := ranks[trainer.global_rank]) is not None:
                self._loaded = {"used": int(own["used"]), "current": own["current"]}
                self._loaded["epoch_start"] = own["epoch_start"] or own["current"]
                with plain_execution():
                    set_random_state(self._loaded["epoch_start"])
                    set_random_state(self._loaded["current"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ManifestError(
                f"The random state in the checkpoint (`{KEY}`): expected what `random_state()` returns, found a "
                f"damaged one ({type(error).__name__}: {error}). Delete that key to resume with other random numbers."
            ) from error

    def before_first_epoch(self, trainer: Trainer) -> None:
        """Restore the state from which the loader of the first epoch starts."""
        if not is_restoring(trainer):
            self._loaded = None
        if self._loaded is not None:
            set_random_state(self._loaded["epoch_start" if self._loaded["used"] else "current"])
        self._epoch_start = random_state()

    def before_epoch(self, trainer: Trainer) -> None:
        """Keep the state from which the loader of this epoch starts; that of the first epoch has started before."""
        if trainer.current_epoch != self._first_epoch:
            self._epoch_start = random_state()

    def after_loaders_started(self, trainer: Trainer) -> None:
        """Skip the batches of this epoch that the interrupted run has used, and restore its current random state."""
        self._first_epoch = trainer.current_epoch
        loaded, self._loaded = self._loaded, None
        if loaded is None or not loaded["used"]:
            return
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None  # it has been set up
        if not any(hasattr(loader, "load_state_dict") for loader in fetcher.combined_loader.flattened):
            if _set_epoch_of_samplers(fetcher.combined_loader.flattened, trainer.current_epoch):
                set_random_state(loaded["epoch_start"])
                iter(fetcher)  # Lightning has started the samplers of a resumed run with the order of epoch 0
            _log.info("Skipping %d batches of this epoch that were used before the interruption.", loaded["used"])
            _skip(fetcher, loaded["used"])
        set_random_state(loaded["current"])


def _batches_used(trainer: Trainer) -> int:
    """Count the batches of an unfinished epoch that training has used."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return 0 if progress.is_last_batch else int(progress.current.processed)


def _of_every_rank(trainer: Trainer, own: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Return what each rank has given; only this rank's where an exception has ended the run on this rank alone."""
    ranks: list[dict[str, Any] | None] = [None] * trainer.world_size
    ranks[trainer.global_rank] = own
    if trainer.world_size > 1 and not trainer.interrupted:
        torch.distributed.all_gather_object(ranks, own)
    return ranks


def _set_epoch_of_samplers(loaders: list[Any], epoch: int) -> bool:
    """Set the epoch of the samplers that order by it, and return whether there are any."""
    samplers: list[Any] = [getattr(loader, "sampler", None) for loader in loaders]
    samplers += [getattr(getattr(loader, "batch_sampler", None), "sampler", None) for loader in loaders]
    ordered = [sampler for sampler in samplers if hasattr(sampler, "set_epoch")]
    for sampler in ordered:
        sampler.set_epoch(epoch)
    return bool(ordered)


def _skip(fetcher: Any, count: int) -> None:
    """Read ``count`` batches, and keep as many batches prefetched as there were."""
    for _ in range(count):
        batch = next(fetcher.iterator)
        if getattr(fetcher, "batches", None):
            fetcher.batches.append(batch)
            fetcher.batches.pop(0)
