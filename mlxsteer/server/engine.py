"""The engine: one thread that owns the model, and the line in front of it.

Knows nothing of HTTP. Jobs come in from any thread and leave as events (see `jobs`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxsteer.server.jobs import Busy, Closing, Event, Generation, Job

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.server.prefix import PrefixCache

__all__ = ["Busy", "Closing", "Engine", "Event", "Generation", "Job", "Status"]


@dataclass(frozen=True)
class Status:
    """What the engine is doing, and has done since it started.

    tokens_per_second: of all answers together, over the last seconds. finished: {finish reason:
    answers}. Memory in bytes.
    """

    running: int
    prefilling: int
    queued: int
    max_running: int
    max_queued: int
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    tokens_per_second: float
    finished: dict[str, int]
    active_memory: int
    peak_memory: int
    prefix_entries: int
    prefix_bytes: int


class Engine:
    """Answers many jobs at once on one model, each as if it were alone.

    max_running: rows decoded together, those in prefill included. max_queued: jobs that may wait
    beyond them. prefix_cache: prompts whose state is kept (None: none is).
    """

    def __init__(
        self,
        model: Model,
        *,
        max_running: int = 16,
        max_queued: int = 64,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.model = model
        self.max_running = max_running
        self.max_queued = max_queued
        self.prefix_cache = prefix_cache

    def start(self) -> None:
        """Start the thread that from now on does all work on the model."""
        raise NotImplementedError

    def submit(self, job: Job) -> Generation:
        """Put a job in line.

        Raises Busy (queue full), Closing, ContextLengthError, UsageError (an empty prompt, or
        token ids that the model does not have).
        """
        raise NotImplementedError

    def run_between(self, fn: Callable[[], Any]) -> Future[Any]:
        """Run `fn` on the engine's thread between two steps; the future has its result.

        Work that takes long lets decoding go on: either `fn` is a generator function, whose
        yields are pauses and whose return value is the result, or it calls `breathe` now and
        then (from a progress callback, say). Raises Closing.
        """
        raise NotImplementedError

    def breathe(self) -> None:
        """For long work inside `run_between`: let the answers take one step."""
        raise NotImplementedError

    def generation(self, id: str) -> Generation | None:
        """The generation of this id, if it is in line, being written, or lately done."""
        raise NotImplementedError

    def status(self) -> Status:
        """Counts, rates and memory now."""
        raise NotImplementedError

    def close(self, drain_seconds: float = 30.0) -> None:
        """Take no more jobs, finish those in hand, end the rest as cancelled, stop the thread.

        Those still waiting or running after `drain_seconds` end with finish_reason "cancelled".
        """
        raise NotImplementedError
