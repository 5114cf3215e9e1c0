"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Discriminator, Field

from mlxsteer.prompting import Thinking
from mlxsteer.server.errors import ApiError
from mlxsteer.server.jobs import Job
from mlxsteer.server.message_events import PATH, Reply, frames, whole
from mlxsteer.server.observe import note
from mlxsteer.server.parts import format_of
from mlxsteer.server.running import collect
from mlxsteer.server.schemas import (
    MAX_MESSAGES,
    Body,
    Ignored,
    Loose,
    SampledBody,
    Stops,
    Unsupported,
)
from mlxsteer.server.serving import Serving, serving_of
from mlxsteer.server.sse import EventStream

router = APIRouter(tags=["generate"])


class TextBlock(Loose):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Loose):
    """What the model thought in an earlier turn."""

    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(Loose):
    """A call that the model made earlier."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Loose):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Discriminator("type")]


class Turn(Loose):
    """One message. A last one of the assistant is continued."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class Tool(Loose):
    """Something that the model may call. Tools that a service runs itself are not taken."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None


class ToolChoice(Loose):
    """Whether tools may be called; calls cannot be forced here."""

    type: Literal["auto", "none"]


class ThinkingConfig(Loose):
    """Thinking on or off. budget_tokens is taken and not enforced: only max_tokens is."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class CountBody(Body):
    """A chat whose tokens are counted."""

    model: Annotated[str, Field(max_length=2200)]
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    cache_control: Ignored
    output_config: Unsupported


class MessagesBody(SampledBody, CountBody):
    """A chat to be continued. Any field that is not listed here is refused."""

    max_tokens: Annotated[int, Field(ge=1, le=10_000_000)]
    stop_sequences: Stops | None = None
    metadata: Ignored
    service_tier: Ignored
    inference_geo: Ignored
    container: Unsupported


@router.post(PATH, response_model=None)
async def messages(request: Request, body: MessagesBody) -> Response:
    """Answer a chat, whole or as a stream of server-sent events.

    `X-Mlxsteer-Generation` and `X-Mlxsteer-Steer` are as in /v1/chat/completions.
    """
    serving = serving_of(request)
    steering = await serving.steering(body)
    prompt = await _prompt(serving, body)
    job = Job(
        prompt=prompt,
        plan=steering.plan,
        sampling=serving.sampling(body, body.max_tokens),
        stop=tuple(body.stop_sequences or ()),
        probes=steering.probes,
    )
    generation = serving.submit([job])[0]
    note(request, [generation], steering.plan)
    reply = Reply(steering, generation, format_of(serving.model, prompt, _tools(body)), serving)
    headers = steering.headers([generation])
    if body.stream:
        return EventStream(frames(reply), [generation], headers, serving.settings.keep_alive)
    written = (await collect(request, [generation], [reply.format]))[0]
    return JSONResponse(whole(reply, written), headers=headers)


@router.post(f"{PATH}/count_tokens")
async def count_tokens(request: Request, body: CountBody) -> dict[str, int]:
    """How many tokens the prompt of such a chat has."""
    serving = serving_of(request)
    serving.served(body.model)
    return {"input_tokens": len(await _prompt(serving, body))}


# --- the request -----------------------------------------------------------------------------


async def _prompt(serving: Serving, body: CountBody) -> tuple[int, ...]:
    """Token ids of the chat; of a last turn of the assistant's, its beginning too."""
    chat = _chat(body)
    thinking: Thinking = bool(body.thinking and body.thinking.type != "disabled")
    begun = ""
    if chat and chat[-1]["role"] == "assistant":
        if thinking or chat[-1].get("tool_calls"):
            raise ApiError(
                400,
                "A last message of the assistant's is continued; it may hold text alone, and"
                " thinking must be off.",
                code="invalid_messages",
                param="messages",
            )
        begun = chat.pop()["content"]
    prompt = await serving.render(chat, thinking=thinking, tools=_tools(body))
    return (*prompt, *(await serving.tokenize(begun, special=False) if begun else ()))


def _tools(body: CountBody) -> list[dict[str, Any]] | None:
    if not body.tools or (body.tool_choice and body.tool_choice.type == "none"):
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema,
            },
        }
        for tool in body.tools
    ]


def _chat(body: CountBody) -> list[dict[str, Any]]:
    """The turns as chat templates take them: results of tools become messages of their own."""
    system = body.system if isinstance(body.system, str) else _joined(body.system or [])
    chat: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in body.messages:
        blocks = turn.content
        if isinstance(blocks, str):
            chat.append({"role": turn.role, "content": blocks})
        elif turn.role == "assistant":
            chat.append(_assistant(blocks))
        else:
            chat += _user(blocks)
    return chat


def _joined(blocks: Sequence[TextBlock]) -> str:
    return "\n\n".join(block.text for block in blocks)


def _assistant(blocks: Sequence[Any]) -> dict[str, Any]:
    thought = "".join(block.thinking for block in blocks if block.type == "thinking")
    calls = [_earlier_call(block) for block in blocks if block.type == "tool_use"]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(block.text for block in blocks if block.type == "text"),
    }
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    if any(block.type == "tool_result" for block in blocks):
        raise _misplaced("tool_result", "user")
    return message


def _earlier_call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    function = {"name": block.name, "arguments": arguments}
    return {"id": block.id, "type": "function", "function": function}


def _user(blocks: Sequence[Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in blocks:
        if block.type == "text":
            found.append({"role": "user", "content": block.text})
        elif block.type == "tool_result":
            content = block.content
            text = content if isinstance(content, str) else _joined(content or [])
            message = {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}
            found.append(message)
        else:
            raise _misplaced(block.type, "assistant")
    return _merged(found)


def _merged(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring texts of the user's as one message: many templates want roles to alternate."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"] == "user":
            merged[-1]["content"] += "\n\n" + message["content"]
        else:
            merged.append(message)
    return merged


def _misplaced(kind: str, role: str) -> ApiError:
    message = f"A {kind} block belongs to a message of the {role}."
    return ApiError(400, message, code="invalid_messages", param="messages")
