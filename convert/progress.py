"""What a long run says while it works: a bar with bytes, rate and time left, on stderr.

The library is silent; the command line passes `bar()`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol


class Progress(Protocol):
    """Receives what happens."""

    def start(self, total: int, done: int) -> None:
        """`total` bytes will be written in all; `done` of them are there from an earlier run."""

    def advance(self, nbytes: int) -> None:
        """`nbytes` more are written."""

    def status(self, text: str) -> None:
        """What is being done now."""


class Silent:
    """Says nothing."""

    def start(self, total: int, done: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def status(self, text: str) -> None: ...


SILENT = Silent()


class Pace:
    """`12.3 of 156.2 GB, 310 MB/s, 0:07:44 left`; empty until `start`.

    Averages since the start: a window of seconds would see only downloading or only writing.
    """

    def __init__(self) -> None:
        self.total = self.done = self._before = 0
        self._began = 0.0

    def start(self, total: int, done: int) -> None:
        self.total, self.done, self._before = total, done, done
        self._began = time.monotonic()

    def __str__(self) -> str:
        if not self.total:
            return ""
        size = f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB"
        fresh, seconds = self.done - self._before, time.monotonic() - self._began
        if not fresh or not seconds:
            return size
        left = timedelta(seconds=round((self.total - self.done) * seconds / fresh))
        return f"{size}, {fresh / seconds / 1e6:.0f} MB/s, {left} left"


class Lines:
    """One line per step, for logs and pipes."""

    def __init__(self) -> None:
        self._pace = Pace()
        self.start = self._pace.start

    def advance(self, nbytes: int) -> None:
        self._pace.done += nbytes

    def status(self, text: str) -> None:
        pace = str(self._pace)
        print(f"{text} ({pace})" if pace else text, file=sys.stderr, flush=True)


@contextmanager
def bar() -> Iterator[Progress]:
    """A bar where stderr is a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as Display
    from rich.table import Column
    from rich.text import Text

    pace = Pace()

    class PaceColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(str(pace))

    whole = PaceColumn(table_column=Column(no_wrap=True))
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), whole)
    console = Console(stderr=True)
    with Display(*columns, console=console, transient=True, expand=True) as display:
        task = display.add_task("reading headers", total=None)

        class Bar:
            def start(self, total: int, done: int) -> None:
                pace.start(total, done)
                display.update(task, total=total, completed=done)

            def advance(self, nbytes: int) -> None:
                pace.done += nbytes
                display.update(task, completed=pace.done)

            def status(self, text: str) -> None:
                display.update(task, description=text)

        yield Bar()
