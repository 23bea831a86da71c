"""Options of channel pruning, with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_light.budgets import Budget, require_reducible
from lightning_light.criteria import Criterion, LearnedGates, Magnitude
from lightning_light.errors import UnsupportedError
from lightning_light.structured.ranking import Global, Ranking
from lightning_light.targets import Targets
from lightning_light.validation import Fraction, OpenFraction, PositiveInt, validated

__all__ = ["ChannelPruningOptions", "Widths", "check_gates", "check_goal"]


@validated
@dataclass(frozen=True)
class Widths:
    """Bound the number of channels that pruned layers keep.

    Args:
        round_to: widths stay multiples of it (8 suits most hardware); 1 for any width.
        min_channels: fewest channels of a layer.
        min_remaining: smallest fraction of its original channels that a layer keeps, in [0, 1].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    round_to: PositiveInt = 1
    min_channels: PositiveInt = 2
    min_remaining: Fraction = 0.1


@validated
@dataclass(frozen=True)
class ChannelPruningOptions:
    """What `prune_channels` and `StructuredPruning` have in common.

    Args:
        criterion: scores weights; the channels with the lowest scores are removed first.
        ranking: which channels are compared with each other: `Global`, `Local` or `Isomorphic`; or
            `Sensitivity`, by the change of the outputs.
        targets: layers whose output channels may be removed: patterns or `Targets`.
        remaining: layer pattern -> fraction of the layer's channels that stays, in (0, 1]; such layers are not ranked.
            Later patterns override earlier ones.
        widths: bounds on the number of channels that layers keep.
        heads: what is removed from an attention layer: ``"dim"``, the same positions of every head, or ``"head"``,
            whole heads.
        calibration_batches: batches that a data-dependent criterion and the correction of batch-norm statistics use.
        correct_batch_norm: move the batch-norm statistics by what the last cut did to them.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    criterion: Criterion = Magnitude()
    ranking: Ranking = Global()
    targets: Targets | str | list[str] | None = None
    remaining: dict[str, OpenFraction] | None = None
    widths: Widths = Widths()
    heads: Literal["dim", "head"] = "dim"
    calibration_batches: PositiveInt = 16
    correct_batch_norm: bool = True


def check_goal(call: str, budget: Budget | None, remaining: Mapping[str, float] | None) -> None:
    """Refuse a call without a budget, or a budget that removed channels cannot reach.

    Raises:
        ValueError: neither a budget nor ``remaining`` is given, or the budget counts what does not shrink.
    """
    if budget is None and not remaining:
        raise ValueError(
            f"`{call}()`: expected a budget or `remaining`, found neither. To keep 40 % of the multiply-accumulates "
            "pass `MACs(0.4)`."
        )
    if budget is not None:
        require_reducible(call, budget, "channels")


def check_gates(call: str, options: ChannelPruningOptions) -> None:
    """Refuse `LearnedGates` where a budget for the whole network is not all that decides the widths.

    Raises:
        UnsupportedError: ``remaining`` is given, or the ranking is not `Global`.
    """
    if not isinstance(options.criterion, LearnedGates):
        return
    for name, allowed, remedy in (
        ("remaining", not options.remaining, "Keep layers as they are by `targets=Targets(exclude=...)`"),
        ("ranking", isinstance(options.ranking, Global), "Leave `ranking` at its default"),
    ):
        if not allowed:
            raise UnsupportedError(
                f"`{call}(criterion={options.criterion!r}, {name}={getattr(options, name)!r})`: expected the budget "
                f"alone to decide the widths, since gates are trained under it, found `{name}`. {remedy}, or use "
                "another criterion, for instance `Taylor()`."
            )
