"""Weights and gates by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mlxsteer.probe import Probe
from mlxsteer.timing import Gate, Timing


def gate(value: float = 0.5, above: bool = True, margin: float = 0.1) -> Gate:
    direction = np.ones(1, np.float32)
    return Gate(Probe("code", 3, "residual", direction, 0.0, 1.0, margin), above, value)


def turned(made: Gate, readings: list[float]) -> str:
    """Its state after each reading, beginning shut."""
    states, state = "", False
    for reading in readings:
        state = made.after(state, reading)
        states += "1" if state else "0"
    return states


def test_a_gate_opens_past_its_value_and_closes_a_margin_later() -> None:
    readings = [0.45, 0.5, 0.51, 0.45, 0.41, 0.39, 0.45, 0.6, float("nan"), 0.45]
    assert turned(gate(), readings) == "0011100100"
    assert turned(gate(margin=0.0), readings) == "0010000100"


def test_below_is_the_mirror_of_above() -> None:
    readings = [0.45, 0.5, 0.51, 0.45, 0.41, 0.39, 0.45, 0.6]
    mirrored = [-reading for reading in readings]
    assert turned(gate(-0.5, above=False), mirrored) == turned(gate(0.5), readings)


@pytest.mark.parametrize(
    ("timing", "weights"),
    [
        (Timing(first=2), [0, 1, 1, 0, 0, 0]),
        (Timing(after=2), [0, 0, 0, 1, 1, 1]),
        (Timing(after=1, first=3), [0, 0, 1, 1, 0, 0]),
        (Timing(decay=2), [0, 1, 0.5**0.5, 0.5, 0.5**1.5, 0.25]),
        (Timing(decay=1, after=2), [0, 0, 0, 1, 0.5, 0.25]),
        (Timing(gate=gate(), first=3), [0, 0, 1, 1, 0, 0]),
    ],
)
def test_weights_count_generated_tokens(timing: Timing, weights: list[float]) -> None:
    """From the position before the last of the prompt on, with its gate open."""
    open_gates = {timing.gate.key: True} if timing.gate else {}
    found = [timing.weight(count, open_gates) for count in range(-1, 5)]
    assert found == pytest.approx(weights)


def test_a_gate_that_nothing_opened_is_shut() -> None:
    shut = Timing(gate=gate())
    assert [shut.weight(5, gates) for gates in ({}, {shut.gate.key: False})] == [0, 0]


def test_keys_tell_apart_what_acts_differently() -> None:
    made = [
        *(Timing(gate=g) for g in (gate(), gate(0.6), gate(above=False), gate(margin=0.2))),
        *(Timing(first=2), Timing(after=2), Timing(decay=2), Timing(gate=gate(), first=2)),
    ]
    assert len({timing.key for timing in made}) == len(made)
    assert Timing(gate=gate(), decay=3).key == Timing(gate=gate(), decay=3).key
