"""When a term acts: how much of its strength at each generated token, and the gate that decides.

Plain arithmetic of counts and readings. `count` is how many tokens of the answer were generated
before the one that a position gives: 0 at the last prompt position, whose logits give the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mlxsteer.probe import Probe


@dataclass(frozen=True, eq=False)
class Gate:
    """Open while a probe reads above (`above`) or below `value`, with hysteresis.

    It opens when a reading is past `value`, and closes when one is back by more than the
    probe's margin, so that a reading which hovers about the value does not make it flicker.
    """

    probe: Probe
    above: bool
    value: float

    @cached_property
    def key(self) -> str:
        """Equal for gates that open and close alike."""
        return repr((self.probe.key, self.above, self.value))

    @property
    def closes_at(self) -> float:
        """The reading past which an open gate closes."""
        return self.value + (-self.probe.margin if self.above else self.probe.margin)

    def after(self, was_open: bool, reading: float) -> bool:
        """Whether it is open after `reading`. A reading that is no number closes it."""
        limit = self.closes_at if was_open else self.value
        return reading > limit if self.above else reading < limit

    def __str__(self) -> str:
        side, back = ("above", "below") if self.above else ("below", "above")
        return (
            f"while {self.probe.name} reads {side} {self.value:g} at layer {self.probe.layer}"
            f" (until {back} {self.closes_at:g})"
        )


@dataclass(frozen=True, eq=False)
class Timing:
    """A term's condition and schedule."""

    gate: Gate | None = None
    first: int | None = None
    after: int | None = None
    decay: int | None = None

    @cached_property
    def key(self) -> str:
        """Equal for timings that do the same."""
        return repr((self.gate.key if self.gate else "", self.first, self.after, self.decay))

    def weight(self, count: int, open_gates: Mapping[str, bool]) -> float:
        """The share of the strength that acts at `count`; 0 where the term does not act.

        A gate goes by the position before, beginning with the last prompt position, so it is
        shut at count 0. Decay: 0.5^(n/decay), n counted from the first token the term may act on.
        """
        begin = self.after or 0
        if count < begin or (self.first is not None and count >= self.first):
            return 0.0
        if self.gate is not None and not (count > 0 and open_gates.get(self.gate.key, False)):
            return 0.0
        return 1.0 if self.decay is None else 0.5 ** ((count - begin) / self.decay)

    def __str__(self) -> str:
        parts = [str(self.gate)] if self.gate else []
        if self.first is not None:
            parts.append(f"up to token {self.first} of an answer")
        if self.after is not None:
            parts.append(f"from token {self.after + 1} of an answer on")
        if self.decay is not None:
            parts.append(f"halving every {self.decay} tokens")
        return ", ".join(parts)
