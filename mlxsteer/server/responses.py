"""POST /v1/responses, in OpenAI's newer form. Nothing is stored: each request holds its chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from mlxsteer.server.chat_completions import thinking_of
from mlxsteer.server.jobs import Job
from mlxsteer.server.observe import note
from mlxsteer.server.parts import format_of
from mlxsteer.server.response_events import Reply, frames, whole
from mlxsteer.server.running import collect
from mlxsteer.server.schemas import (
    MAX_MESSAGES,
    MAX_TOP_LOGPROBS,
    Ignored,
    Loose,
    SampledBody,
    TextFormat,
    Unsupported,
    text_only,
)
from mlxsteer.server.serving import serving_of
from mlxsteer.server.sse import EventStream

router = APIRouter(tags=["generate"])
PATH = "/v1/responses"


class InputText(Loose):
    """A piece of a message's text. Images and files are not taken."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(Loose):
    """One message of the chat."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]


class FunctionCall(Loose):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutput(Loose):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]


class ReasoningText(Loose):
    """A piece of a thought."""

    text: str


class ReasoningItem(Loose):
    """What the model thought in an earlier turn."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None


Item = InputMessage | FunctionCall | FunctionOutput | ReasoningItem


class FunctionTool(Loose):
    """Something that the model may call. Tools that a service runs itself are not taken."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ReasoningOptions(Loose):
    """How hard to think; a summary is not made."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class TextOptions(Loose):
    """The answer's form: text."""

    format: Annotated[TextFormat | None, text_only("the answer's form")] = None


class ResponseBody(SampledBody):
    """A chat to be continued. Any field that is not listed here is refused."""

    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1, le=10_000_000)] = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        None
    )
    tools: Annotated[list[FunctionTool], Field(max_length=256)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: Unsupported
    conversation: Unsupported
    prompt: Unsupported
    max_tool_calls: Unsupported
    context_management: Unsupported
    store: Ignored
    metadata: Ignored
    user: Ignored
    safety_identifier: Ignored
    prompt_cache_key: Ignored
    prompt_cache_retention: Ignored
    service_tier: Ignored
    stream_options: Ignored


@router.post(PATH, response_model=None)
async def create_response(request: Request, body: ResponseBody) -> Response:
    """Answer a chat, whole or as a stream of server-sent events.

    `X-Mlxsteer-Generation` and `X-Mlxsteer-Steer` are as in /v1/chat/completions. Responses are
    not kept: `store` changes nothing and `previous_response_id` is refused.
    """
    serving = serving_of(request)
    steering = await serving.steering(body)
    tools = None if body.tool_choice == "none" else _tools(body.tools)
    thinking = thinking_of(body.reasoning.effort if body.reasoning else None)
    prompt = await serving.render(_chat(body), thinking=thinking, tools=tools)
    wants = "message.output_text.logprobs" in (body.include or []) or bool(body.top_logprobs)
    job = Job(
        prompt=prompt,
        plan=steering.plan,
        sampling=serving.sampling(body, body.max_output_tokens),
        logprobs=(body.top_logprobs or 0) if wants else None,
        probes=steering.probes,
    )
    generation = serving.submit([job])[0]
    note(request, [generation], steering.plan)
    format = format_of(serving.model, prompt, tools)
    reply = Reply(generation, format, steering, serving, _echo(body))
    headers = steering.headers([generation])
    if body.stream:
        alive = serving.settings.keep_alive
        return EventStream(frames(reply), [generation], headers, alive)
    written = (await collect(request, [generation], [format]))[0]
    return JSONResponse(whole(reply, written), headers=headers)


def _tools(tools: Sequence[FunctionTool] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    return [
        {
            "type": "function",
            "function": tool.model_dump(include={"name", "description", "parameters"}),
        }
        for tool in tools
    ]


def _echo(body: ResponseBody) -> dict[str, Any]:
    """What a response repeats of its request."""
    return {
        "instructions": body.instructions,
        "metadata": body.metadata if isinstance(body.metadata, dict) else {},
        "parallel_tool_calls": True,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_output_tokens": body.max_output_tokens,
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.model_dump() for tool in body.tools or []],
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "store": False,
        "previous_response_id": None,
    }


# --- the input as a chat -----------------------------------------------------------------------


def _chat(body: ResponseBody) -> list[dict[str, Any]]:
    chat: list[dict[str, Any]] = []
    if body.instructions:
        chat.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*chat, {"role": "user", "content": body.input}]
    for item in body.input:
        _put(chat, item)
    return chat


def _put(chat: list[dict[str, Any]], item: Item) -> None:
    """Add an item; what the assistant did between two messages belongs to one turn of its."""
    if isinstance(item, InputMessage) and item.role != "assistant":
        chat.append({"role": item.role, "content": _text(item.content)})
        return
    if isinstance(item, FunctionOutput):
        chat.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        return
    if not chat or chat[-1]["role"] != "assistant":
        chat.append({"role": "assistant", "content": ""})
    turn = chat[-1]
    if isinstance(item, InputMessage):
        turn["content"] += _text(item.content)
    elif isinstance(item, ReasoningItem):
        thought = "".join(piece.text for piece in item.content or [])
        turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
    else:
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
