"""What /v1/messages replies: content blocks, whole or event by event."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from mlxsteer.server.chat_completions import readings_of
from mlxsteer.server.errors import as_api_error, body_of
from mlxsteer.server.jobs import Event, Generation
from mlxsteer.server.parts import Call, Content, Format, Part, Reasoning
from mlxsteer.server.running import Written, follow
from mlxsteer.server.serving import Serving, Steering
from mlxsteer.server.sse import frame
from mlxsteer.server.usage import anthropic_usage

PATH = "/v1/messages"


@dataclass(frozen=True)
class Reply:
    """A message on its way."""

    steering: Steering
    generation: Generation
    format: Format
    serving: Serving


def _head(reply: Reply) -> dict[str, Any]:
    return {
        "id": f"msg_{reply.generation.id}",
        "type": "message",
        "role": "assistant",
        "model": reply.serving.model.label,
    }


def whole(reply: Reply, written: Written) -> dict[str, Any]:
    """The message object of a whole answer."""
    blocks: list[dict[str, Any]] = []
    if written.reasoning:
        blocks.append(_opened("reasoning") | {"thinking": written.reasoning})
    if written.content or not written.calls:
        blocks.append(_opened("content") | {"text": written.content})
    for call in written.calls:
        blocks.append(_opened(call) | {"input": json.loads(call.arguments)})
    extension: dict[str, Any] = {}
    if reply.steering.probes:
        extension["readings"] = [readings_of(reply.steering, event) for event in written.tokens]
    return {
        **_head(reply),
        "content": blocks,
        **_stopped(written),
        "usage": anthropic_usage(written),
        **extension,
    }


def _stopped(written: Written) -> dict[str, Any]:
    assert written.end is not None
    reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[written.finish]
    sequence = written.end.stop_sequence
    if sequence is not None and reason == "end_turn":
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _opened(kind: str | Call) -> dict[str, Any]:
    """A block of the answer as it begins."""
    if isinstance(kind, Call):
        return {"type": "tool_use", "id": kind.id, "name": kind.name, "input": {}}
    if kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


async def frames(reply: Reply) -> AsyncGenerator[str]:
    """The events of a stream; an error becomes the last of them."""
    written = Written(reply.generation)
    blocks = _Blocks()
    try:
        message = {**_head(reply), "content": [], "stop_reason": None, "stop_sequence": None}
        message["usage"] = {"input_tokens": reply.generation.prompt_tokens, "output_tokens": 0}
        yield _event({"type": "message_start", "message": message})
        waiting: list[Event] = []
        async for step in follow(reply.generation, reply.format, written):
            if step.token is not None:
                waiting.append(step.token)
            for part in step.parts:
                extension, waiting = _extension(reply.steering, part, waiting)
                for data in blocks.take(part, extension):
                    yield _event(data)
        if blocks.open is None and not written.calls:
            for data in blocks.take(Content(""), {}):
                yield _event(data)
        for data in blocks.close():
            yield _event(data)
        usage = anthropic_usage(written)
        yield _event({"type": "message_delta", "delta": _stopped(written), "usage": usage})
        yield _event({"type": "message_stop"})
    except Exception as error:
        yield _event(body_of(as_api_error(error), PATH))


def _extension(
    steering: Steering, part: Part, waiting: list[Event]
) -> tuple[dict[str, Any], list[Event]]:
    """What this API does not know: the steering in force, and the meters' readings."""
    if not isinstance(part, Content) or not waiting:
        return {}, waiting
    extension: dict[str, Any] = {"steer": waiting[-1].steer}
    if steering.probes:
        extension["readings"] = [readings_of(steering, event) for event in waiting]
    return extension, []


def _event(data: dict[str, Any]) -> str:
    return frame(data, data["type"])


class _Blocks:
    """The content blocks of a stream: one open at a time."""

    def __init__(self) -> None:
        self.index = -1
        self.open: str | None = None

    def take(self, part: Part, extension: dict[str, Any]) -> list[dict[str, Any]]:
        """The events that carry `part`."""
        if isinstance(part, Call):
            frames = [*self.close(), self._start("call", _opened(part))]
            delta = {"type": "input_json_delta", "partial_json": part.arguments}
            return [*frames, self._delta(delta, {}), *self.close()]
        kind = "reasoning" if isinstance(part, Reasoning) else "content"
        frames = []
        if self.open != kind:
            frames = [*self.close(), self._start(kind, _opened(kind))]
        key, word = (
            ("thinking", "thinking_delta") if kind == "reasoning" else ("text", "text_delta")
        )
        return [*frames, self._delta({"type": word, key: part.text}, extension)]

    def close(self) -> list[dict[str, Any]]:
        """The events that end the open block, if there is one."""
        if self.open is None:
            return []
        self.open = None
        return [{"type": "content_block_stop", "index": self.index}]

    def _start(self, kind: str, block: dict[str, Any]) -> dict[str, Any]:
        self.index += 1
        self.open = kind
        return {"type": "content_block_start", "index": self.index, "content_block": block}

    def _delta(self, delta: dict[str, Any], extension: dict[str, Any]) -> dict[str, Any]:
        event = {"type": "content_block_delta", "index": self.index, "delta": delta}
        return {**event, **extension}
