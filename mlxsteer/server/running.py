"""From generations to answers: events into parts, one stream or one whole, ended on leaving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from fastapi import Request

from mlxsteer.server.errors import ApiError
from mlxsteer.server.jobs import Event, Generation
from mlxsteer.server.parts import Call, Content, Format, Part, Reasoning, Splitter


@dataclass(frozen=True)
class Step:
    """What one event brought. token: the event, where it is a token of the content."""

    index: int
    parts: tuple[Part, ...]
    token: Event | None
    end: Event | None


@dataclass
class Written:
    """An answer so far, or whole."""

    generation: Generation
    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[Event] = field(default_factory=list)
    reasoning_tokens: int = 0
    end: Event | None = None

    def add(self, step: Step) -> None:
        """Take in the next step."""
        for part in step.parts:
            if isinstance(part, Reasoning):
                self.reasoning += part.text
            elif isinstance(part, Content):
                self.content += part.text
            else:
                self.calls.append(part)
        if step.token is not None:
            self.tokens.append(step.token)
        self.end = step.end or self.end

    @property
    def finish(self) -> str:
        """`stop`, `length` or `tool_calls`."""
        assert self.end is not None
        reason = self.end.finish_reason or "stop"
        return "tool_calls" if self.calls and reason == "stop" else reason


async def follow(generation: Generation, format: Format, written: Written) -> AsyncIterator[Step]:
    """The steps of one answer, each also added to `written`.

    Raises ApiError when the answer ends in an error or is cancelled.
    """
    splitter = Splitter(format)
    async for event in generation:
        before = splitter.state
        parts = list(splitter.feed(event.text))
        end = event if event.finish_reason else None
        if end is not None:
            parts += splitter.finish()
            _check_end(end)
        is_token = event.token >= 0
        written.reasoning_tokens += is_token and "reasoning" in (before, splitter.state)
        plain = is_token and before == splitter.state == "content"
        step = Step(0, tuple(parts), event if plain else None, end)
        written.add(step)
        yield step


def _check_end(end: Event) -> None:
    if end.finish_reason == "error":
        raise ApiError(500, end.error or "The answer failed.", code="generation_failed")
    if end.finish_reason == "cancelled":
        raise ApiError(
            503,
            "The answer was stopped before its end.",
            code="cancelled",
            headers={"Retry-After": "5"},
        )


async def steps(written: Sequence[Written], formats: Sequence[Format]) -> AsyncIterator[Step]:
    """The steps of several answers as they come, told apart by `index`."""
    queue: asyncio.Queue[Step | BaseException | None] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async for step in follow(written[index].generation, formats[index], written[index]):
                queue.put_nowait(Step(index, step.parts, step.token, step.end))
            queue.put_nowait(None)
        except Exception as error:  # handed to the reader
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(index)) for index in range(len(written))]
    try:
        open_answers = len(written)
        while open_answers:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                open_answers -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def collect(
    request: Request, generations: Sequence[Generation], formats: Sequence[Format]
) -> list[Written]:
    """The whole answers. A client that leaves cancels them."""
    written = [Written(generation) for generation in generations]

    async def write() -> None:
        async for _ in steps(written, formats):
            pass

    writing = asyncio.create_task(write())
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            raise ApiError(499, "The client left.", code="client_left")
        writing.result()
    finally:
        writing.cancel()
        leaving.cancel()
        for generation in generations:
            generation.cancel()
    return written


async def _left(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
