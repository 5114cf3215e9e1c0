"""Stop texts: events are held back while their text may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlxsteer.server.jobs import Event


class Held:
    """The events of one answer that cannot be shown yet, in order.

    Whole events wait, not only their text, so that each keeps its phase and its readings.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._events: list[Event] = []

    def add(self, event: Event) -> tuple[list[Event], str | None]:
        """(the events that can go now, the stop text that is complete or None).

        With a stop text all go, cut where it begins.
        """
        self._events.append(event)
        text = "".join(held.text for held in self._events)
        found = min(((text.find(s), -len(s), s) for s in self._stops if s in text), default=None)
        if found is not None:
            return self._cut(found[0]), found[2]
        return self._released(len(text) - self._undecided(text)), None

    def rest(self) -> list[Event]:
        """Everything still held."""
        events, self._events = self._events, []
        return events

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def _released(self, safe: int) -> list[Event]:
        count = end = 0
        for event in self._events:
            end += len(event.text)
            if end > safe:
                break
            count += 1
        events, self._events = self._events[:count], self._events[count:]
        return events

    def _cut(self, length: int) -> list[Event]:
        cut = []
        for event in self.rest():
            cut.append(replace(event, text=event.text[: max(0, length)]))
            length -= len(event.text)
        return cut
