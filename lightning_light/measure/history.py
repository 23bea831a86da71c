"""Record what remains of each layer during a run, with one column per change."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypedDict

from lightning_light.measure.layer_matching import match_layers, remaining
from lightning_light.measure.snapshot import Snapshot
from lightning_light.schema import Length
from lightning_light.targets import inside
from lightning_light.validation import NonNegativeInt

__all__ = ["History", "PlainHistory", "with_sequences"]

_MAX_COLUMNS = 256  # a picture shows no more


class PlainHistory(TypedDict):
    """A `History` in a checkpoint."""

    layers: list[str]
    steps: list[NonNegativeInt]
    channels: Annotated[list[list[float]], Length("steps")]
    weights: Annotated[list[list[float]], Length("steps")]
    totals: Annotated[list[dict[str, float]], Length("steps")]
    end: NonNegativeInt


@dataclass(frozen=True)
class History:
    """The remaining fraction of each layer over the steps of a run.

    Attributes:
        layers: names, in the model's order.
        steps: the step at which each column begins.
        channels: per column, the remaining fraction of each layer's output channels.
        weights: per column, the remaining fraction of each layer's nonzero parameters.
        totals: per column, the remaining fraction of the model's ``params``, ``bytes``, and ``macs`` (if known).
        end: the last recorded step.
    """

    layers: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    channels: tuple[tuple[float, ...], ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    totals: tuple[dict[str, float], ...] = ()
    end: int = 0

    @classmethod
    def of(cls, before: Snapshot, layers: Collection[str]) -> History:
        """Return an empty history of ``layers``: names of layers, or of modules that contain them."""
        return cls(layers=tuple(row.name for row in before.rows if inside(row.name, layers)))

    def extended(self, step: int, before: Snapshot, now: Snapshot) -> History:
        """Return the history with one more step; with the same columns if nothing has changed since the last."""
        fractions = {row.name: remaining(pair) for pair in match_layers(before.rows, now.rows) for row in pair.before}
        channels, weights = zip(*((0.0, 0.0), *(fractions[name] for name in self.layers)), strict=True)
        channels = tuple(round(fraction, 4) for fraction in channels[1:])
        weights = tuple(round(fraction, 4) for fraction in weights[1:])
        totals = _totals(before, now)
        if self.steps and (channels, weights, totals) == (self.channels[-1], self.weights[-1], self.totals[-1]):
            return replace(self, end=step)
        return replace(
            self,
            steps=(*self.steps, step),
            channels=(*self.channels, channels),
            weights=(*self.weights, weights),
            totals=(*self.totals, totals),
            end=step,
        )._thinned()

    def of_most_changed(self, quantity: Literal["channels", "weights"], count: int) -> History:
        """Return the history of the ``count`` layers that have the least remaining channels or weights."""
        last = (self.channels if quantity == "channels" else self.weights)[-1]
        kept = sorted(sorted(range(len(last)), key=lambda index: last[index])[:count])
        return replace(
            self,
            layers=tuple(self.layers[index] for index in kept),
            channels=tuple(tuple(column[index] for index in kept) for column in self.channels),
            weights=tuple(tuple(column[index] for index in kept) for column in self.weights),
        )

    def plain(self) -> dict[str, Any]:
        """Return plain types, for a checkpoint."""
        return {name: with_sequences(value, list) for name, value in vars(self).items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> History:
        """Restore what `plain` returned."""
        return cls(**{name: with_sequences(value, tuple) for name, value in plain.items()})

    def _thinned(self) -> History:
        """Drop every other column where there are too many, and keep the first and the last."""
        count = len(self.steps)
        if count <= _MAX_COLUMNS:
            return self
        kept = [index for index in range(count) if index % 2 == 0 or index == count - 1]
        names = ("steps", "channels", "weights", "totals")
        columns: dict[str, Any] = {name: tuple(getattr(self, name)[index] for index in kept) for name in names}
        return replace(self, **columns)


def with_sequences(value: Any, kind: type[list[Any]] | type[tuple[Any, ...]]) -> Any:
    """Return plain data with all sequences of one ``kind``."""
    if isinstance(value, Mapping):
        return {key: with_sequences(item, kind) for key, item in value.items()}
    return kind(with_sequences(item, kind) for item in value) if isinstance(value, list | tuple) else value


def _totals(before: Snapshot, now: Snapshot) -> dict[str, float]:
    pairs = {"params": (before.params, now.params), "bytes": (before.bytes, now.bytes)}
    if before.macs is not None and now.macs is not None:
        pairs["macs"] = (before.macs, now.macs)
    return {key: round(has / had, 4) for key, (had, has) in pairs.items() if had}
