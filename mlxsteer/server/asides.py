"""Work that others ask of the engine's thread, done between steps."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any


class Aside:
    """A function to be run on the engine's thread, in slices where it is a generator function."""

    def __init__(self, fn: Callable[[], Any]):
        self.future: Future[Any] = Future()
        self._fn = fn
        self._slices: Generator[Any, None, Any] | None = None

    def advance(self) -> bool:
        """Run the next slice; True when there is none left (or nobody waits for the result)."""
        if self._slices is None and not self.future.set_running_or_notify_cancel():
            return True
        try:
            return self._slice()
        except BaseException as error:
            self.future.set_exception(error)
            return True

    def abandon(self) -> None:
        """Stop here; the future is cancelled, or says that the server shut down."""
        if self._slices is not None:
            self._slices.close()
            self.future.set_exception(RuntimeError("The server shut down before this was done."))
        else:
            self.future.cancel()

    def _slice(self) -> bool:
        if self._slices is None:
            result = self._fn()
            if not isinstance(result, Generator):
                self.future.set_result(result)
                return True
            self._slices = result
        try:
            next(self._slices)
        except StopIteration as end:
            self.future.set_result(end.value)
            return True
        return False
