"""What /v1/responses replies: output items, whole or event by event."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

from mlxsteer.server.chat_completions import readings_of, token_logprob
from mlxsteer.server.errors import as_api_error
from mlxsteer.server.jobs import Event, Generation
from mlxsteer.server.parts import Call, Format, Part, Reasoning
from mlxsteer.server.running import Written, follow
from mlxsteer.server.serving import Serving, Steering
from mlxsteer.server.sse import frame
from mlxsteer.server.usage import responses_usage


@dataclass(frozen=True)
class Reply:
    """A response on its way. echo: what it repeats of its request."""

    generation: Generation
    format: Format
    steering: Steering
    serving: Serving
    echo: dict[str, Any]

    def object(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The response object."""
        return {
            "id": f"resp_{self.generation.id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.serving.model.label,
            "output": output,
            "usage": None,
            **self.echo,
            **more,
        }


def whole(reply: Reply, written: Written) -> dict[str, Any]:
    """The response object of a whole answer."""
    items = _Items(reply)
    if written.reasoning:
        items.take(Reasoning(written.reasoning), [])
    if written.content or not written.calls:
        list(items.say(written.content, written.tokens))
    for call in written.calls:
        items.take(call, [])
    list(items.close())
    return _finished(reply, written, items.output)


def _finished(reply: Reply, written: Written, output: list[dict[str, Any]]) -> dict[str, Any]:
    short = written.finish == "length"
    details = {"incomplete_details": {"reason": "max_output_tokens"}} if short else {}
    if short and output:
        output[-1]["status"] = "incomplete"
    usage = responses_usage(written)
    return reply.object("incomplete" if short else "completed", output, usage=usage, **details)


async def frames(reply: Reply) -> AsyncGenerator[str]:
    """The events of a stream, numbered; an error becomes the last of them."""
    written = Written(reply.generation)
    items = _Items(reply)
    number = 0

    def event(data: dict[str, Any]) -> str:
        nonlocal number
        text = frame({**data, "sequence_number": number}, data["type"])
        number += 1
        return text

    started = reply.object("in_progress", [])
    try:
        yield event({"type": "response.created", "response": started})
        yield event({"type": "response.in_progress", "response": started})
        waiting: list[Event] = []
        async for step in follow(reply.generation, reply.format, written):
            if step.token is not None:
                waiting.append(step.token)
            for part in step.parts:
                for data in items.take(part, waiting):
                    yield event(data)
                if not isinstance(part, Call | Reasoning):
                    waiting = []
        if not items.output:
            for data in items.say("", []):
                yield event(data)
        for data in items.close():
            yield event(data)
        done = _finished(reply, written, items.output)
        yield event({"type": f"response.{done['status']}", "response": done})
    except Exception as error:
        found = as_api_error(error)
        fault = {"code": "server_error", "message": found.message}
        failed = reply.object("failed", items.output, error=fault)
        yield event({"type": "response.failed", "response": failed})


class _Items:
    """The output items so far, the last of which may be open; gives the events that grow them."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.output: list[dict[str, Any]] = []
        self._open = ""

    def take(self, part: Part, tokens: list[Event]) -> list[dict[str, Any]]:
        """The events that carry `part`."""
        if isinstance(part, Call):
            return list(self._call(part))
        if isinstance(part, Reasoning):
            return list(self._think(part.text))
        return list(self.say(part.text, tokens))

    def say(self, text: str, tokens: list[Event]) -> Iterator[dict[str, Any]]:
        """The events that add `text`, made of `tokens`, to the message."""
        if self._open != "message":
            yield from self.close()
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield from self._begin({"type": "message", "role": "assistant", "content": []}, part)
        part = self.output[-1]["content"][0]
        logprobs = []
        if self.reply.generation.job.logprobs is not None:
            logprobs = [token_logprob(self.reply.serving, token) for token in tokens]
        part["text"] += text
        part["logprobs"] = [*part["logprobs"], *logprobs]
        extension: dict[str, Any] = {"steer": tokens[-1].steer} if tokens else {}
        if tokens and self.reply.steering.probes:
            extension["readings"] = [readings_of(self.reply.steering, token) for token in tokens]
        kind = "response.output_text.delta"
        yield {**self._place(), "type": kind, "delta": text, "logprobs": logprobs, **extension}

    def _think(self, text: str) -> Iterator[dict[str, Any]]:
        if self._open != "reasoning":
            yield from self.close()
            part = {"type": "reasoning_text", "text": ""}
            yield from self._begin({"type": "reasoning", "summary": [], "content": []}, part)
        self.output[-1]["content"][0]["text"] += text
        yield {**self._place(), "type": "response.reasoning_text.delta", "delta": text}

    def _call(self, call: Call) -> Iterator[dict[str, Any]]:
        yield from self.close()
        item = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
        yield from self._begin(item, None)
        item = self.output[-1]
        item |= {"arguments": call.arguments, "status": "completed"}
        place = {"item_id": item["id"], "output_index": len(self.output) - 1}
        kind = "response.function_call_arguments"
        yield {**place, "type": f"{kind}.delta", "delta": call.arguments}
        yield {**place, "type": f"{kind}.done", "arguments": call.arguments, "name": call.name}
        self._open = ""
        yield self._item_event("done")

    def _begin(self, item: dict[str, Any], part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[item["type"]]
        id = f"{prefix}_{self.reply.generation.id}_{len(self.output)}"
        self.output.append({"id": id, "status": "in_progress", **item})
        self._open = item["type"]
        yield self._item_event("added")
        if part is not None:
            yield {**self._place(), "type": "response.content_part.added", "part": dict(part)}
            self.output[-1]["content"] = [part]

    def close(self) -> Iterator[dict[str, Any]]:
        """The events that end the open item, if there is one."""
        if not self._open:
            return
        item, part = self.output[-1], self.output[-1]["content"][0]
        if self._open == "message":
            done = {"type": "response.output_text.done", "logprobs": part["logprobs"]}
        else:
            done = {"type": "response.reasoning_text.done"}
        yield {**self._place(), **done, "text": part["text"]}
        yield {**self._place(), "type": "response.content_part.done", "part": dict(part)}
        item["status"] = "completed"
        self._open = ""
        yield self._item_event("done")

    def _place(self) -> dict[str, Any]:
        index = len(self.output) - 1
        return {"item_id": self.output[-1]["id"], "output_index": index, "content_index": 0}

    def _item_event(self, what: str) -> dict[str, Any]:
        item = dict(self.output[-1])
        index = len(self.output) - 1
        return {"type": f"response.output_item.{what}", "output_index": index, "item": item}
