"""Who is in a batch: each row's steering and phase, carried beside its prompt cache.

mlx-lm moves a sequence's caches through merging, filtering, padding and splitting. `RowCache` is
one more cache in that list, so the knowledge of which row is whose moves with them, and the model
call can read it. Nothing here touches model arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from mlxsteer.edits import PADDING
from mlxsteer.plan import ANSWER, PROMPT, THINK, TOOL, Plan
from mlxsteer.probe import Probe
from mlxsteer.timing import Gate

Tokens = tuple[int, ...]
Unread = tuple[Any, int, int, int]  # (tokens [B, T], row, first, past the last)

LAG = 16  # steps after which a token is long computed, so reading it waits for nothing


@dataclass(frozen=True)
class Markers:
    """Token sequences that change the phase of what is generated; empty where a model has none."""

    think_start: Tokens = ()
    think_end: Tokens = ()
    tool_start: Tokens = ()
    tool_end: Tokens = ()

    @classmethod
    def of(cls, tokenizer: Any) -> Markers:
        """The markers of an mlx-lm tokenizer."""

        def tokens(name: str) -> Tokens:
            return tuple(getattr(tokenizer, name, None) or ())

        return cls(
            tokens("think_start_tokens"),
            tokens("think_end_tokens"),
            tokens("tool_call_start_tokens"),
            tokens("tool_call_end_tokens"),
        )

    def __bool__(self) -> bool:
        return bool(self.think_start or self.tool_start)

    @property
    def longest(self) -> int:
        return max(map(len, (self.think_start, self.think_end, self.tool_start, self.tool_end)))


class Readings:
    """What P probes read in the B rows of a pass; looked at when a row first asks."""

    def __init__(self, keys: Sequence[str], array: Any):
        """keys: of the probes. array: float32 [P, B], perhaps not computed yet."""
        self.keys = tuple(keys)
        self.array = array

    def of(self, row: int) -> dict[str, float]:
        """{probe key: reading} of one row."""
        return dict(zip(self.keys, self._values[:, row].tolist(), strict=True))

    @cached_property
    def _values(self) -> np.ndarray:
        return np.array(self.array)


@dataclass
class Control:
    """What steers a sequence now. Shared by reference, so a new plan acts on the next token."""

    plan: Plan | None = None


@dataclass
class Row:
    """One sequence: its control, how long its prompt is, and where it stands.

    first: the phase of the first generated token (ANSWER, or THINK when the prompt opens a
    thought). seen: tokens already in the cache. unread: generated tokens that were not looked at
    yet, because no phase mattered; a plan that comes later finds the right phase through them.
    open_gates: {gate key: whether it is open} after the position before the last; readings: those
    of the last, and the row in them, until they are looked at.
    """

    control: Control
    prompt_length: int
    first: int = ANSWER
    markers: Markers = field(default_factory=Markers)
    seen: int = 0
    phase: int = 0
    recent: Tokens = ()
    unread: tuple[Unread, ...] = ()
    open_gates: Mapping[str, bool] = field(default_factory=dict)
    readings: tuple[Readings, int] | None = None

    @property
    def count(self) -> int:
        """How many tokens of the answer are generated before the one that the next position gives.

        0 at the last prompt position, negative before it.
        """
        return self.seen - (self.prompt_length - 1)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates of its plan."""
        return self.control.plan.gates if self.control.plan else ()

    def weights(self, count: int, plan: Plan | None) -> np.ndarray | None:
        """`plan.weights` of the next `count` positions; None where the plan has no timings.

        Where it has gates, waits for the last readings.
        """
        self._turn_gates(plan.gates if plan else ())
        if not plan or not plan.timings:
            return None
        return plan.weights(range(self.count, self.count + count), self.open_gates)

    def _turn_gates(self, gates: Sequence[Gate]) -> None:
        """Open and close `gates` as the last readings say; one that was not read is shut."""
        if not gates:
            self.open_gates, self.readings = {}, None
        if self.readings is None:
            return
        readings, index = self.readings
        found, self.readings = readings.of(index), None
        self.open_gates = {
            gate.key: gate.after(self.open_gates.get(gate.key, False), found[gate.probe.key])
            for gate in gates
            if gate.probe.key in found
        }

    @property
    def needs_tokens(self) -> bool:
        """Whether its phase depends on which tokens come (costs one synchronisation each)."""
        plan = self.control.plan
        if not plan or not self.markers:
            return False
        return len({plan.stamp(phase) for phase in (THINK, ANSWER, TOOL)}) > 1

    def phases(self, count: int, tokens: Sequence[int] | None) -> list[int]:
        """The phases of the next `count` positions; moves on past them."""
        if tokens is None:
            return [self._advance(None) for _ in range(count)]
        self._read(len(self.unread))
        return [self._advance(token) for token in tokens[:count]]

    def defer(self, tokens: Any, index: int, count: int) -> None:
        """Keep the next `count` positions, row `index` of `tokens`, to be looked at later."""
        start = max(0, self.prompt_length - self.seen)
        if self.markers and start < count:
            self.unread = (*self.unread, (tokens, index, start, count))
            self._read(len(self.unread) - LAG)

    def _read(self, count: int) -> None:
        """Follow the first `count` of the unread tokens."""
        if count <= 0:
            return
        due, self.unread = self.unread[:count], self.unread[count:]
        self.phase = self.phase or self.first
        for tokens, index, start, end in due:
            for token in tokens.tolist()[index][start:end]:
                self._follow(token)

    def _advance(self, token: int | None) -> int:
        position = self.seen
        self.seen += 1
        if position < self.prompt_length - 1:
            return PROMPT
        if position == self.prompt_length - 1:
            self.phase, self.recent, self.unread = self.first, (), ()
            self.open_gates, self.readings = {}, None
            return PROMPT | self.first
        if self.phase == 0:
            self.phase = self.first
        if token is not None and self.markers:
            self._follow(token)
        return self.phase

    def _follow(self, token: int) -> None:
        self.recent = (*self.recent, token)[-self.markers.longest :]

        def ended_with(marker: Tokens) -> bool:
            return bool(marker) and self.recent[-len(marker) :] == marker

        if self.phase == TOOL:
            if ended_with(self.markers.tool_end):
                self.phase = ANSWER
        elif ended_with(self.markers.tool_start):
            self.phase = TOOL
        elif ended_with(self.markers.think_end):
            self.phase = ANSWER
        elif ended_with(self.markers.think_start):
            self.phase = THINK


class RowCache:
    """The rows of a batch, as one more entry of mlx-lm's list of caches."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = list(rows)
        self._lengths: list[int] | None = None

    # --- what the model call reads ---------------------------------------------------------

    @property
    def plans(self) -> list[Plan | None]:
        return [row.control.plan for row in self.rows]

    def weights(self, count: int, plans: Sequence[Plan | None]) -> list[np.ndarray | None]:
        """Per row, `Row.weights` of the next `count` positions."""
        return [row.weights(count, plan) for row, plan in zip(self.rows, plans, strict=True)]

    def pieces(self, count: int) -> list[int]:
        """The lengths of the parts in which the next `count` positions must run.

        A gate goes by the position before, so a row with gates takes its generated positions one
        by one.
        """
        ends = {count}
        for index, row in enumerate(self.rows):
            if row.gates:
                real = count if self._lengths is None else min(count, self._lengths[index])
                ends |= set(range(max(1, 1 - row.count), real + 1))
        edges = [0, *sorted(ends)]
        return [end - start for start, end in pairwise(edges)]

    def take(self, tokens: Any) -> np.ndarray:
        """Phases [B, T] of the positions of `tokens` [B, T]; padding is 0. Moves the rows on."""
        batch, count = tokens.shape
        values = tokens.tolist() if any(row.needs_tokens for row in self.rows) else None
        phases = np.full((batch, count), PADDING, np.int64)
        for index, row in enumerate(self.rows):
            real = count
            if self._lengths is not None:
                real = max(0, min(count, self._lengths[index]))
                self._lengths[index] -= real
            if values is None:
                row.defer(tokens, index, real)
            phases[index, :real] = row.phases(real, values[index] if values else None)
        return phases

    def probes(self, phases: np.ndarray) -> dict[str, Probe]:
        """What to read at the last of the positions just taken, by key."""
        rows = [self.rows[index] for index in self._gated(phases)]
        return {gate.probe.key: gate.probe for row in rows for gate in row.gates}

    def note(self, phases: np.ndarray, readings: Readings) -> None:
        """Keep what `probes` read there, for the gates at the next positions."""
        for index in self._gated(phases):
            self.rows[index].readings = (readings, index)

    def _gated(self, phases: np.ndarray) -> list[int]:
        """The rows whose next position has gates that go by the last one taken."""
        return [
            index
            for index, row in enumerate(self.rows)
            if row.gates and row.count > 0 and phases[index, -1] != PADDING
        ]

    # --- mlx-lm's cache protocol -------------------------------------------------------------

    @property
    def state(self) -> list[Any]:
        return []

    @state.setter
    def state(self, value: Any) -> None:
        if value:
            raise ValueError("rows hold no arrays")

    nbytes = 0

    @property
    def offset(self) -> int:
        return self.rows[0].seen

    def is_trimmable(self) -> bool:
        return False

    def empty(self) -> bool:
        return all(row.seen == 0 for row in self.rows)

    @classmethod
    def merge(cls, caches: Sequence[RowCache]) -> RowCache:
        return cls([row for cache in caches for row in cache.rows])

    def extend(self, other: RowCache) -> None:
        self.rows.extend(other.rows)

    def filter(self, keep: Any) -> None:
        keep = keep.tolist() if hasattr(keep, "tolist") else list(keep)
        self.rows = [self.rows[index] for index in keep]

    def extract(self, index: int) -> RowCache:
        return RowCache([replace(self.rows[index])])

    def prepare(self, *, lengths: Any = None, **padding: Any) -> None:
        """The next positions are right-padded: row i holds `lengths[i]` real ones."""
        self._lengths = list(lengths) if lengths is not None else None

    def finalize(self) -> None:
        self._lengths = None

    def __deepcopy__(self, memo: Any) -> RowCache:
        # Controls stay shared: a slider moved later must reach the row wherever it went.
        copied = RowCache([replace(row) for row in self.rows])
        copied._lengths = list(self._lengths) if self._lengths is not None else None
        return copied
