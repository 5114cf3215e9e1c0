"""Server-sent events: frames, a sign of life in silence, and an end when the reader leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mlxsteer.server.jobs import Generation

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"


def frame(data: Mapping[str, Any], event: str | None = None) -> str:
    """One event as text."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """Frames as they come. However the response ends, its generations end with it."""

    def __init__(
        self,
        frames: AsyncGenerator[str],
        generations: Sequence[Generation],
        headers: Mapping[str, str],
        keep_alive: float,
    ) -> None:
        self.generations = generations
        headers = {**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(
            kept_alive(frames, keep_alive), media_type="text/event-stream", headers=headers
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generation in self.generations:
                generation.cancel()


async def kept_alive(frames: AsyncGenerator[str], seconds: float) -> AsyncIterator[str]:
    """`frames`, and a comment whenever none came for `seconds`."""
    coming = asyncio.ensure_future(anext(frames))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=seconds)
            if not done:
                yield KEEP_ALIVE
                continue
            try:
                ready = coming.result()
            except StopAsyncIteration:
                return
            yield ready
            coming = asyncio.ensure_future(anext(frames))
    finally:
        coming.cancel()
        await asyncio.wait({coming})
        await frames.aclose()
