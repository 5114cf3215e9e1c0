"""What a long run says while it works: a bar with bytes, rate and time left, on stderr.

The library is silent; the command line passes `bar()`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


class Lines:
    """One line per step, for logs and pipes."""

    def __init__(self) -> None:
        self._total = self._done = 0

    def start(self, total: int, done: int) -> None:
        self._total, self._done = total, done

    def advance(self, nbytes: int) -> None:
        self._done += nbytes

    def status(self, text: str) -> None:
        share = f"{100 * self._done / self._total:3.0f}%  " if self._total else ""
        print(f"{share}{text}", file=sys.stderr, flush=True)


@contextmanager
def bar() -> Iterator[Progress]:
    """A bar where stderr is a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task("reading headers", total=None)

        class Bar:
            def start(self, total: int, done: int) -> None:
                display.reset(task, total=total, completed=done)

            def advance(self, nbytes: int) -> None:
                display.advance(task, nbytes)

            def status(self, text: str) -> None:
                display.update(task, description=text)

        yield Bar()
