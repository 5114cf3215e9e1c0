"""What is asked of the engine and what comes back: jobs, events, and an answer in the making.

A `Generation` is the meeting point of the engine's thread, which writes it, and of readers in
any other thread or event loop. It knows nothing of models.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mlxsteer.errors import MlxsteerError
from mlxsteer.generation import Sampling
from mlxsteer.plan import ANSWER, Plan

if TYPE_CHECKING:
    from mlxsteer.probe import Probe

State = Literal["queued", "prefill", "running", "done"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
NO_TOKEN = -1  # of the closing event


class Busy(MlxsteerError):
    """The queue is full. retry_after: seconds after which a place is likely to be free."""

    def __init__(self, queued: int, retry_after: float):
        super().__init__(
            f"The server is busy: {queued} requests are waiting already. Try again in"
            f" {retry_after:.0f} s."
        )
        self.retry_after = retry_after


class Closing(MlxsteerError):
    """The engine is shutting down, or was never started."""


@dataclass(frozen=True)
class Job:
    """One answer to be written.

    prompt: token ids. stop: texts that end the answer and are left out of it. logprobs: how many
    alternatives each event names (None: no log-probabilities at all). logit_bias: {token id:
    added to its logit}. presence_penalty, frequency_penalty: taken off the logits of tokens that
    the answer holds already, once and per occurrence. probes: what each
    event reads.
    """

    prompt: tuple[int, ...]
    plan: Plan
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class Event:
    """One token of an answer, or its close.

    Every token of the answer is one event, in order; the end token is none. Then comes exactly
    one closing event, with `token` -1, a `finish_reason`, and the last of the text. An event
    whose text may be the beginning of a stop text is held back until that is decided.

    text: what the token adds; may be empty where a character is not complete yet. phase: what it
    belongs to (plan.THINK, ANSWER or TOOL; a marker belongs to what it opens or closes). logprob,
    top: natural logarithms of probabilities under the model as steered, before penalties, bias,
    temperature and filters; `top` is the likeliest alternatives, best first. steer: the steering
    in force when the token was computed. readings: of the job's probes, where the token was
    computed (one position before it is written). stop_sequence: the stop text that ended it.
    error: what went wrong, for people.
    """

    text: str
    token: int = NO_TOKEN
    phase: int = ANSWER
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    steer: str = ""
    readings: tuple[float, ...] = ()
    stop_sequence: str | None = None
    error: str | None = None


class Generation:
    """An answer that is being written.

    id: unique in this process. job: what was asked. state: queued, prefill, running or done.
    prompt_tokens; cached_tokens: how many of them were found in the prefix cache; prefilled: how
    many are done, those included. tokens: how many the answer has so far. created, finished:
    seconds of `time.monotonic`. Any number of readers may follow it, each from the start.
    """

    def __init__(self, job: Job, on_cancel: Callable[[], None] = lambda: None):
        self.id = uuid.uuid4().hex
        self.job = job
        self.state: State = "queued"
        self.prompt_tokens = len(job.prompt)
        self.cached_tokens = 0
        self.prefilled = 0
        self.created = time.monotonic()
        self.finished: float | None = None
        self.cancelled = False
        self._on_cancel = on_cancel
        self._plan = job.plan
        self._begun = 0
        self.tokens = 0
        self._events: list[Event] = []
        self._lock = threading.Condition()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    # --- for readers -----------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        """The events from the first on, waiting for each; ends after the closing one."""
        at = 0
        while True:
            with self._lock:
                self._lock.wait_for(lambda at=at: len(self._events) > at)  # type: ignore[misc]
                event = self._events[at]
            yield event
            if event.finish_reason:
                return
            at += 1

    async def __aiter__(self) -> AsyncIterator[Event]:
        """`events` for an event loop: `async for event in generation`."""
        news = asyncio.Event()
        waiting = (asyncio.get_running_loop(), news)
        with self._lock:
            self._waiting.add(waiting)
        try:
            at = 0
            while True:
                news.clear()
                with self._lock:
                    fresh = self._events[at:]
                for event in fresh:
                    yield event
                    if event.finish_reason:
                        return
                at += len(fresh)
                if not fresh:
                    await news.wait()
        finally:
            with self._lock:
                self._waiting.discard(waiting)

    def cancel(self) -> None:
        """End it at the next step with finish_reason "cancelled". Nothing when it is done."""
        self.cancelled = True
        self._on_cancel()

    def steer(self, plan: Plan) -> int:
        """Put the rest under `plan`; returns the index of the first token that obeys.

        That is the next token whose computation has not begun; of one in the queue or in
        prefill, the first (index 0). MlxsteerError when the answer is done.
        """
        with self._lock:
            if self.state == "done":
                raise MlxsteerError(
                    "This answer is complete, so its steering cannot change. Ask again with the"
                    " new steering."
                )
            self._plan = plan
            return self._begun

    @property
    def plan(self) -> Plan:
        """The steering of the next token."""
        return self._plan

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it goes on."""
        return self._events[-1].finish_reason if self.state == "done" else None

    # --- for the engine --------------------------------------------------------------------

    def begin(self, index: int) -> Plan:
        """The steering of token `index`, which is now being computed."""
        with self._lock:
            self._begun = index + 1
            return self._plan

    def put(self, event: Event) -> None:
        """Hand an event to the readers; a closing one ends the answer."""
        with self._lock:
            if self.state == "done":
                return
            if event.finish_reason:
                self.state = "done"
                self.finished = time.monotonic()
            self._events.append(event)
            self.tokens += event.token >= 0
            self._lock.notify_all()
            waiting = list(self._waiting)
        for loop, news in waiting:
            with suppress(RuntimeError):  # the reader's loop has closed
                loop.call_soon_threadsafe(news.set)
