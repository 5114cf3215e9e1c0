"""What the user sees: answers as they come, thoughts dim, two answers side by side.

Answers go to stdout, everything else to stderr. Styles are for terminals that want them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.text import Text

    from mlxsteer.generation import Piece

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
MIN_COLUMNS_WIDTH = 72  # of a terminal: two columns of 35 characters are still read with ease
GAP = 3
LONG_PROMPT = 2048
# A model may write escape sequences; a terminal would obey them.
_HARMLESS = {code: None for code in (*range(32), 127, *range(128, 160)) if code not in (9, 10)}


def styled(out: TextIO) -> bool:
    """Whether `out` is a terminal that takes styles (NO_COLOR and TERM=dumb are respected)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def note(text: str) -> None:
    """A line about what happened, to stderr."""
    print(f"{DIM}{text}{PLAIN}" if styled(sys.stderr) else text, file=sys.stderr, flush=True)


def note_if_empty(pieces: Sequence[Piece]) -> None:
    """Say why an answer that came to its end has no text, thoughts apart."""
    if not pieces or any(piece.text.strip() and not piece.thinking for piece in pieces):
        return
    thought = any(piece.thinking for piece in pieces)
    if pieces[-1].finish_reason == "length":
        doing = "was still thinking" if thought else "had written nothing but blanks"
        note(f"No answer: the model {doing} when --max-tokens was reached. Give it more.")
    else:
        note(f"The model ended {'after its thoughts ' if thought else ''}without an answer.")


def complain(text: str) -> None:
    """An error, to stderr."""
    print(f"Error: {text}", file=sys.stderr, flush=True)


def show_prefill(done: int, total: int) -> None:
    """How far a long prompt is read, on a terminal's stderr."""
    if total > LONG_PROMPT and sys.stderr.isatty():
        ends = "\r\x1b[K" if done >= total - 1 else ""
        print(f"\rReading the prompt: {done:,} of {total:,} tokens{ends}", end="", file=sys.stderr)
        sys.stderr.flush()


class AnswerPrinter:
    """Prints pieces to stdout as they come. Off a terminal, thoughts are left out."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._styled = styled(sys.stdout)
        self._dim = False
        self._last = ""

    def __call__(self, piece: Piece) -> None:
        if piece.thinking and not self._terminal:
            return
        text = harmless(piece.text) if self._terminal else piece.text
        if not self._last:
            text = text.lstrip()
        if text:
            self._set_dim(piece.thinking)
            self._write(text)

    def end(self) -> None:
        """Close the answer: styles off, the line ended."""
        self._set_dim(False)
        if self._last not in ("", "\n"):
            self._write("\n")

    def _set_dim(self, dim: bool) -> None:
        if self._styled and dim != self._dim:
            print(DIM if dim else PLAIN, end="")
            self._dim = dim

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)
        self._last = text[-1]


def harmless(text: str) -> str:
    """`text` without control characters other than tab and newline."""
    return text.translate(_HARMLESS)


# --- two answers --------------------------------------------------------------------------------


class Blocks:
    """Two answers one below the other, each under its label."""

    def __init__(self, labels: tuple[str, str]) -> None:
        self._labels = labels

    @contextmanager
    def open(self) -> Iterator[Blocks]:
        yield self

    @contextmanager
    def side(self, index: int) -> Iterator[Callable[[Piece], None]]:
        """Inside the block, the yielded function prints pieces of answer `index`."""
        print(f"{chr(10) * index}== {self._labels[index]} ==", flush=True)
        printer = AnswerPrinter()
        try:
            yield printer
        finally:
            printer.end()


class Columns:
    """Two answers side by side in a terminal; while they grow, as much of their ends as fits."""

    def __init__(self, labels: tuple[str, str]) -> None:
        from rich.console import Console
        from rich.text import Text

        self._console = Console(highlight=False)
        self._labels = labels
        self._texts = (Text(), Text())
        self._width = (self._console.width - GAP) // 2
        self._live: Any = None

    @contextmanager
    def open(self) -> Iterator[Columns]:
        """Inside the block the answers grow; at its end they stand in full."""
        from rich.live import Live

        try:
            with Live(console=self._console, transient=True, refresh_per_second=8) as self._live:
                yield self
        finally:
            self._console.print(self._rows(None, 0))

    @contextmanager
    def side(self, index: int) -> Iterator[Callable[[Piece], None]]:
        """Inside the block, the yielded function adds pieces to answer `index`."""
        text = self._texts[index]

        def add(piece: Piece) -> None:
            new = harmless(piece.text) if text else harmless(piece.text).lstrip()
            text.append(new, style="dim" if piece.thinking and styled(sys.stdout) else "")
            self._live.update(self._rows(self._console.height - 2, index))

        yield add

    def _rows(self, height: int | None, growing: int) -> Text:
        """The lines of both columns; of more than `height`, those where the growing one ends."""
        from rich.text import Text

        sides = [self._lines(text) for text in self._texts]
        end = len(sides[growing]) if height else max(map(len, sides))
        start = max(0, end - height) if height else 0
        heads = [Text(label, style="bold" if styled(sys.stdout) else "") for label in self._labels]
        shown = [[head, *lines[start : start + height if height else None]] for head, lines in
                 zip(heads, sides, strict=True)]  # fmt: skip
        rows = [
            self._row(*(side[i] if i < len(side) else Text() for side in shown))
            for i in range(max(map(len, shown)))
        ]
        return Text("\n").join(rows)

    def _row(self, left: Text, right: Text) -> Text:
        padded = left.copy()
        padded.truncate(self._width, pad=True)
        return padded.append(" " * GAP).append_text(right)

    def _lines(self, text: Text) -> list[Text]:
        return list(text.wrap(self._console, self._width)) if text else []


def side_by_side(labels: tuple[str, str]) -> Blocks | Columns:
    """Columns where stdout is a terminal wide enough, else blocks."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        from rich.console import Console

        if Console().width >= MIN_COLUMNS_WIDTH:
            return Columns(labels)
    return Blocks(labels)
