"""Progress of long work, on stderr, so that results on stdout stay clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]  # (label, steps done, total)
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def reporting(listener: Listener) -> Iterator[None]:
    """Long work inside the block tells `listener` how far it is, in place of drawing bars."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def progress(label: str, total: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar of `total` steps; yields `advance(steps)`. Shows nothing when not `enabled`."""
    if (listener := _listener.get()) is not None:
        yield _told(listener, label, total)
        return
    if not enabled or total <= 0:
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps: bar.update(task, advance=steps)


def _told(listener: Listener, label: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        listener(label, done, total)

    return advance


def say(message: str, *, enabled: bool = True) -> None:
    """One line to stderr."""
    if enabled:
        import sys

        print(message, file=sys.stderr, flush=True)
