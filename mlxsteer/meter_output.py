"""Readings in a terminal: tokens coloured by the first meter, and a table of all after the answer.

The table goes to stdout where that is a terminal, else to stderr, so that pipes carry answers
alone. Without styles nothing is coloured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

import numpy as np

from mlxsteer.generation import Piece
from mlxsteer.meter import Series, series_of
from mlxsteer.repl_output import AnswerPrinter, styled

if TYPE_CHECKING:
    from mlxsteer.probe import Probe

# Least to most; none = the terminal's own colour. All have a contrast above 3 with black and
# with white.
COLOURS = ("#1f77d0", "#5c86b8", "", "#b07a4a", "#e0641c")
REACH = 4.0  # margins of a probe from the centre to the full colour
BARS = "▁▂▃▄▅▆▇█"
CHART_WIDTH = 40
HEADS = ("meter", "mean", "lowest", "highest", "over the answer")


class MeteredPrinter(AnswerPrinter):
    """Prints pieces as they come, coloured by the first probe's reading; the table at the end."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        super().__init__()
        self._probes = probes
        self._pieces: list[Piece] = []
        self._level, self._total, self._count = 0.0, 0.0, 0
        self._out = _Colourist(sys.stdout) if self._styled else None

    def __call__(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._level = 0.0
        if piece.readings and not piece.thinking:
            reading = piece.readings[0]
            self._total, self._count = self._total + reading, self._count + 1
            mean = self._total / self._count
            self._level = float(levels(self._probes[0], np.array(reading), mean))
        super().__call__(piece)

    def end(self) -> None:
        """Close the answer and show what was read."""
        super().end()
        show_table(self._probes, series_of(self._probes, self._pieces))

    def _write(self, text: str) -> None:
        if self._out:
            self._out.write(text, colour_of(self._level))
            self._last = text[-1]
        else:
            super()._write(text)


class _Colourist:
    """Text in one of `COLOURS`, by rich, which knows what the terminal can show."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=out, highlight=False)

    def write(self, text: str, colour: str) -> None:
        from rich.text import Text

        self._console.print(Text(text, style=colour), end="", soft_wrap=True)
        self._console.file.flush()


def levels(probe: Probe, readings: np.ndarray, mean: float) -> np.ndarray:
    """Readings [...] of an answer as levels from -1 (least) to 1 (most).

    The centre lies between the poles; where they are not known, at the answer's `mean` reading.
    """
    centre = 0.5 if probe.poles else mean
    return np.clip((readings - centre) / (REACH * probe.margin), -1, 1)


def colour_of(level: float) -> str:
    """One of `COLOURS` for a level from -1 to 1."""
    return COLOURS[round((level + 1) / 2 * (len(COLOURS) - 1))]


def show_table(probes: Sequence[Probe], series: Series, label: str = "") -> None:
    """A line per meter: mean, lowest and highest reading, and their course; then the legend."""
    if not len(series.values):
        return
    out = sys.stdout if sys.stdout.isatty() else sys.stderr
    rows = [list(HEADS), *(_row(probe, series.values[:, i]) for i, probe in enumerate(probes))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    print(f"\n{label}" if label else "", file=out)
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:4], widths[1:4], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *numbers, row[4]]), file=out)
    _legend(probes, out)
    out.flush()


def _row(probe: Probe, readings: np.ndarray) -> list[str]:
    numbers = [readings.mean(), readings.min(), readings.max()]
    shown = [f"{number:+.3f}" for number in numbers]
    return [f"{probe.name}@{probe.layer}", *shown, _chart(levels(probe, readings, numbers[0]))]


def _chart(heights: np.ndarray) -> str:
    """Bars for levels [T], neighbours put together where they are more than fit."""
    parts = np.array_split(heights, min(CHART_WIDTH, len(heights)))
    return "".join(BARS[round((part.mean() + 1) / 2 * (len(BARS) - 1))] for part in parts)


def _legend(probes: Sequence[Probe], out: TextIO) -> None:
    first = probes[0]
    if styled(out):
        colourist = _Colourist(out)
        out.write(f"{first.name}: less ")
        for colour in COLOURS:
            colourist.write("■", colour)
        out.write(" more. ")
    out.write(f"{' '.join(_scales(probes))}\n")


def _scales(probes: Sequence[Probe]) -> list[str]:
    """What the numbers mean, in sentences."""
    between = [probe.name for probe in probes if probe.poles]
    others = [probe.name for probe in probes if not probe.poles]
    said = []
    if between:
        whose = "" if not others else f"{', '.join(between)}: "
        said.append(f"{whose}0 and 1 are where the examples of the two poles lie.")
    if others:
        whose = "Readings" if not between else f"{', '.join(others)}: readings"
        said.append(f"{whose} in residual norms, shown about the answer's own mean.")
    return said
