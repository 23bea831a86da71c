"""The events of a run in words: what each method did at which step, kept in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from lightning_light.validation import NonNegativeInt

__all__ = ["HISTORY", "History", "add_event", "event_text"]

HISTORY = "history"
"""Key of the compression state under which the events of all methods are kept, in order."""

_MAX_REPEATED = 8  # events, among which an equal one is not kept again


class _Summary(TypedDict):
    step: NonNegativeInt
    epoch: NonNegativeInt
    method: str
    summary: str


class Event(_Summary, total=False):
    """What one method did at one step, and which event of its run it was: ``"4/10"``."""

    part: str


class History(TypedDict):
    """What a checkpoint holds."""

    events: list[Event]


def add_event(state: dict[str, dict[str, Any]], event: dict[str, Any]) -> None:
    """Append an event, unless the method has repeated itself."""
    events = state.setdefault(HISTORY, {"events": []})["events"]
    if all(_key(event) != _key(earlier) for earlier in events[-_MAX_REPEATED:]):
        events.append(event)


def event_text(event: Mapping[str, Any]) -> str:
    """Return the line of an event.

    Example:
        >>> event_text({"method": "structured_pruning", "part": "4/10", "summary": "26 channels removed"})
        'structured pruning 4/10: 26 channels removed'
    """
    part = f" {event['part']}" if event.get("part") else ""
    return f"{event['method'].replace('_', ' ')}{part}: {event['summary']}"


def _key(event: Mapping[str, Any]) -> tuple[Any, ...]:
    return event["method"], event["summary"]
