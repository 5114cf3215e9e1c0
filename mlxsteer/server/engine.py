"""The engine: one thread that owns the model, and the line in front of it.

Knows nothing of HTTP. Jobs come in from any thread and leave as events (see `jobs`). The thread
is here because MLX's streams belong to threads and a model's caches to one writer; what it does
in each turn is in `floor`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxsteer.errors import UsageError
from mlxsteer.prompting import within_context
from mlxsteer.server.asides import Aside
from mlxsteer.server.floor import Floor
from mlxsteer.server.jobs import Busy, Closing, Event, FinishReason, Generation, Job
from mlxsteer.server.settling import settle

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.server.prefix import PrefixCache

__all__ = ["Busy", "Closing", "Engine", "Event", "Generation", "Job", "Status"]

RATE_SECONDS = 10.0  # over which tokens per second are counted
REMEMBERED = 64  # answers that can still be looked up when they are done
FIRST_ESTIMATE = 5.0  # seconds per answer, before any was written

log = logging.getLogger("mlxsteer.server")


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
        self._floor = Floor(model, prefix_cache)
        self._queue: deque[Generation] = deque()
        self._asides: deque[Aside] = deque()
        self._known: OrderedDict[str, Generation] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._recent: deque[tuple[float, int]] = deque()
        self._answer_seconds = FIRST_ESTIMATE
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = True
        self._deadline = float("inf")

    # --- from any thread -------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that from now on does all work on the model.

        Call it in the thread that loaded the model.
        """
        settle(self.model.network)
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="mlxsteer-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Generation:
        """Put a job in line.

        Raises Busy (queue full), Closing, ContextLengthError, UsageError (an empty prompt, or
        token ids that the model does not have).
        """
        self._check(job)
        generation = Generation(job, self._wake)
        with self._news:
            self._require_open()
            waiting = len(self._queue) - max(0, self.max_running - len(self._floor))
            if waiting >= self.max_queued:
                raise Busy(len(self._queue), self._retry_after())
            self._queue.append(generation)
            self._known[generation.id] = generation
            self._news.notify()
        return generation

    def run_between(self, fn: Callable[[], Any]) -> Future[Any]:
        """Run `fn` on the engine's thread between two steps; the future has its result.

        Work that takes long lets decoding go on: either `fn` is a generator function, whose
        yields are pauses and whose return value is the result, or it calls `breathe` now and
        then (from a progress callback, say). Raises Closing.
        """
        aside = Aside(fn)
        with self._news:
            self._require_open()
            self._asides.append(aside)
            self._news.notify()
        return aside.future

    def breathe(self) -> None:
        """For long work inside `run_between`: let the answers take one step.

        Raises Closing when the server has no more time to finish the work.
        """
        if time.monotonic() > self._deadline:
            raise Closing("The server is shutting down.")
        if threading.current_thread() is self._thread:
            self._turn()

    def generation(self, id: str) -> Generation | None:
        """The generation of this id, if it is in line, being written, or lately done."""
        return self._known.get(id)

    def status(self) -> Status:
        """Counts, rates and memory now."""
        with self._news:
            return Status(
                running=self._floor.running,
                prefilling=self._floor.prefilling,
                queued=len(self._queue),
                max_running=self.max_running,
                max_queued=self.max_queued,
                prompt_tokens=self._counts["prompt"],
                cached_tokens=self._counts["cached"],
                answer_tokens=self._floor.tokens,
                tokens_per_second=self._rate(),
                finished=dict(self._finished),
                active_memory=mx.get_active_memory(),
                peak_memory=mx.get_peak_memory(),
                prefix_entries=len(self.prefix_cache) if self.prefix_cache is not None else 0,
                prefix_bytes=self.prefix_cache.nbytes if self.prefix_cache is not None else 0,
            )

    def close(self, drain_seconds: float = 30.0) -> None:
        """Take no more jobs, finish those in hand, end the rest as cancelled, stop the thread.

        Those still waiting or running after `drain_seconds` end with finish_reason "cancelled".
        """
        with self._news:
            self._closing = True
            self._deadline = time.monotonic() + drain_seconds
            self._news.notify()
        if self._thread is not None:
            self._thread.join()

    def _check(self, job: Job) -> None:
        if not job.prompt:
            raise UsageError("The prompt is empty. Give at least one token.")
        within_context(self.model, list(job.prompt))
        vocabulary = self.model.vocabulary
        for token in (*job.prompt, *job.logit_bias):
            if not 0 <= token < vocabulary:
                raise UsageError(
                    f"There is no token {token}: {self.model.label} has tokens 0 to"
                    f" {vocabulary - 1}."
                )

    def _require_open(self) -> None:
        if self._closing:
            raise Closing("The server is shutting down and takes no more requests.")

    def _retry_after(self) -> float:
        """Seconds until a place in the queue is free, from how long answers took lately."""
        return min(60.0, max(1.0, self._answer_seconds / self.max_running))

    def _wake(self) -> None:
        with self._news:
            self._news.notify()

    # --- on the engine's thread --------------------------------------------------------------

    def _work(self) -> None:
        while self._wait():
            self._turn()
            self._take_aside()
        self._end()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when it is time to stop."""
        with self._news:
            self._news.wait_for(lambda: self._closing or self._in_hand)
            if not self._closing:
                return True
            return bool(self._in_hand) and time.monotonic() < self._deadline

    @property
    def _in_hand(self) -> int:
        return len(self._queue) + len(self._floor) + len(self._asides)

    def _turn(self) -> None:
        """Let rows in and out, and give each row in hand its next token or slice of prompt."""
        self._admit()
        before = self._floor.tokens
        try:
            self._floor.turn()
        except Exception as error:  # the server goes on; what it had in hand cannot
            log.exception("a turn of the engine failed")
            self._floor.fail_all(f"The server failed: {error}")
        with self._news:
            self._recent.append((time.monotonic(), self._floor.tokens - before))
            while self._recent[0][0] < time.monotonic() - RATE_SECONDS:
                self._recent.popleft()
        self._settle()

    def _admit(self) -> None:
        room = self.max_running if self._floor.batches_rows else 1
        while True:
            with self._news:
                for generation in [g for g in self._queue if g.cancelled]:
                    self._queue.remove(generation)
                    self._close_unstarted(generation, "cancelled")
                if not self._queue or len(self._floor) >= room:
                    return
                generation = self._queue.popleft()
            try:
                self._floor.enter(generation)
            except Exception as error:
                log.exception("request %s cannot begin", generation.id)
                self._close_unstarted(generation, "error", f"The answer cannot begin: {error}")

    def _settle(self) -> None:
        """Count what is done, and forget the oldest."""
        for generation in self._floor.leave():
            self._counts["prompt"] += generation.prompt_tokens
            self._counts["cached"] += generation.cached_tokens
            self._note_done(generation)

    def _note_done(self, generation: Generation) -> None:
        assert generation.finish_reason is not None
        self._finished[generation.finish_reason] += 1
        seconds = time.monotonic() - generation.created
        self._answer_seconds += 0.2 * (seconds - self._answer_seconds)
        with self._news:
            done = [id for id, known in self._known.items() if known.state == "done"]
            for id in done[:-REMEMBERED]:
                del self._known[id]

    def _close_unstarted(
        self, generation: Generation, reason: FinishReason, error: str | None = None
    ) -> None:
        generation.put(Event("", finish_reason=reason, error=error))
        self._note_done(generation)

    def _take_aside(self) -> None:
        if self._asides and self._asides[0].advance():
            self._asides.popleft()
        elif self._asides:
            self._asides.rotate(-1)

    def _rate(self) -> float:
        since = time.monotonic() - RATE_SECONDS
        return sum(count for when, count in self._recent if when >= since) / RATE_SECONDS

    def _end(self) -> None:
        self._floor.cancel_all()
        self._settle()
        with self._news:
            while self._queue:
                self._close_unstarted(self._queue.popleft(), "cancelled")
            while self._asides:
                self._asides.popleft().abandon()
        self._floor.clear()
        settle(self.model.network)  # for those who use the model next
