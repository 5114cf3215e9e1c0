"""POST /v1/chat/completions, in OpenAI's form."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from mlxsteer.prompting import Thinking
from mlxsteer.server.errors import ApiError, as_api_error, body_of, refused
from mlxsteer.server.jobs import Event, Generation, Job
from mlxsteer.server.observe import note
from mlxsteer.server.parts import Call, Content, Format, Reasoning, format_of
from mlxsteer.server.running import Step, Written, collect, steps
from mlxsteer.server.schemas import (
    MAX_MESSAGES,
    MAX_TOP_LOGPROBS,
    Body,
    Ignored,
    Loose,
    OpenSampledBody,
    Stops,
    TextFormat,
    Unsupported,
    one_or_many,
    text_only,
)
from mlxsteer.server.serving import Serving, Steering, serving_of
from mlxsteer.server.sse import DONE, EventStream, frame
from mlxsteer.server.usage import open_usage

router = APIRouter(tags=["generate"])
PATH = "/v1/chat/completions"


class TextPart(Loose):
    """A piece of a message's text. Images, audio and files are not taken."""

    type: Literal["text"]
    text: str


class CalledFunction(Loose):
    """What a tool call named, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Loose):
    """A call that the assistant made earlier."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Loose):
    """One message of the chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    function_call: Unsupported
    audio: Unsupported


class Function(Loose):
    """A tool's name, purpose and JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Loose):
    """Something that the model may call."""

    type: Literal["function"]
    function: Function


class StreamOptions(Loose):
    """include_usage: a last chunk that holds the usage."""

    include_usage: bool | None = False


class TemplateOptions(Body):
    """enable_thinking: let the model think first."""

    enable_thinking: bool | None = None


class ChatBody(OpenSampledBody):
    """A chat to be continued. Any field that is not listed here is refused."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int | None, Field(ge=1, le=10_000_000)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=10_000_000)] = None
    n: Annotated[int | None, Field(ge=1, le=8)] = 1
    stop: str | Stops | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    chat_template_kwargs: TemplateOptions | None = None
    response_format: Annotated[TextFormat | None, text_only("the answer's form")] = None
    audio: Unsupported
    functions: Unsupported
    function_call: Unsupported
    prediction: Unsupported
    web_search_options: Unsupported
    modalities: list[Literal["text"]] | None = None
    metadata: Ignored
    store: Ignored
    user: Ignored
    safety_identifier: Ignored
    prompt_cache_key: Ignored
    prompt_cache_retention: Ignored
    service_tier: Ignored
    verbosity: Unsupported


@dataclass(frozen=True)
class Chat:
    """A chat completion on its way: what it is called, and what is written for it."""

    body: ChatBody
    steering: Steering
    generations: Sequence[Generation]
    formats: Sequence[Format]
    serving: Serving

    @property
    def head(self) -> dict[str, Any]:
        id = f"chatcmpl-{self.generations[0].id}"
        return {"id": id, "created": int(time.time()), "model": self.serving.model.label}


@router.post(PATH, response_model=None)
async def chat_completions(request: Request, body: ChatBody) -> Response:
    """Answer a chat, whole or as a stream of server-sent events.

    The response's header `X-Mlxsteer-Generation` is what PATCH /v1/steering/generations/{id}
    takes while a stream runs; `X-Mlxsteer-Steer` is the steering that was applied.
    """
    serving = serving_of(request)
    steering = await serving.steering(body)
    tools = None if body.tool_choice == "none" else _tools(body)
    messages = messages_of(body.messages)
    prompt = await serving.render(messages, thinking=_thinking(body), tools=tools)
    jobs = [_job(serving, body, prompt, steering, index) for index in range(body.n or 1)]
    formats = [format_of(serving.model, prompt, tools)] * len(jobs)
    generations = serving.submit(jobs)
    note(request, generations, steering.plan)
    chat = Chat(body, steering, generations, formats, serving)
    headers = steering.headers(generations)
    if body.stream:
        alive = serving.settings.keep_alive
        return EventStream(_frames(chat), generations, headers, alive)
    written = await collect(request, generations, formats)
    return JSONResponse(_whole(chat, written), headers=headers)


# --- the request -----------------------------------------------------------------------------


def messages_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as chat templates take them."""
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if content is None and not message.tool_calls and not message.reasoning_content:
        raise ApiError(
            400,
            f"A {message.role} message has no content.",
            code="invalid_messages",
            param="messages",
        )
    plain: dict[str, Any] = {"role": message.role, "content": content or ""}
    for key in ("reasoning_content", "tool_call_id", "name"):
        if getattr(message, key) is not None:
            plain[key] = getattr(message, key)
    if message.tool_calls:
        plain["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return plain


def _tools(body: ChatBody) -> list[dict[str, Any]] | None:
    return [tool.model_dump(exclude_none=True) for tool in body.tools] if body.tools else None


def _thinking(body: ChatBody) -> Thinking:
    asked = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None
    effort = body.reasoning_effort
    if asked is not None:
        return asked
    return thinking_of(effort)


def thinking_of(effort: str | None) -> Thinking:
    """How an effort is done here: off, on, or the model's greatest effort."""
    if effort in (None, "none", "minimal"):
        return False
    return "max" if effort in ("xhigh", "max") else True


def _job(
    serving: Serving, body: ChatBody, prompt: tuple[int, ...], steering: Steering, index: int
) -> Job:
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("top_logprobs", "`top_logprobs` needs `logprobs: true`.")
    limit = body.max_completion_tokens or body.max_tokens
    return Job(
        prompt=prompt,
        plan=steering.plan,
        sampling=serving.sampling(body, limit, index),
        stop=one_or_many(body.stop),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        logit_bias=bias_of(body.logit_bias),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        probes=steering.probes,
    )


def bias_of(given: dict[str, float] | None) -> dict[int, float]:
    """{token id: bias}; JSON's keys are texts."""
    if not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in given or {}):
        raise refused("logit_bias", 'The keys of `logit_bias` are token ids, such as "42".')
    return {int(key): value for key, value in (given or {}).items()}


# --- the reply ---------------------------------------------------------------------------------


def _whole(chat: Chat, written: Sequence[Written]) -> dict[str, Any]:
    choices = [_choice(chat, index, answer) for index, answer in enumerate(written)]
    return {
        **chat.head,
        "object": "chat.completion",
        "choices": choices,
        "usage": open_usage(written),
        "system_fingerprint": None,
    }


def _choice(chat: Chat, index: int, answer: Written) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.content if answer.content or not answer.calls else None,
        "refusal": None,
    }
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [tool_call(call) for call in answer.calls]
    choice = {
        "index": index,
        "message": message,
        "finish_reason": answer.finish,
        "logprobs": _logprobs(chat, answer.tokens),
    }
    if chat.steering.probes:
        choice["readings"] = [readings_of(chat.steering, event) for event in answer.tokens]
    return choice


def tool_call(call: Call) -> dict[str, Any]:
    """A call in OpenAI's form."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def readings_of(steering: Steering, event: Event) -> dict[str, float]:
    """{vector: reading} of one token."""
    names = [probe.name for probe in steering.probes]
    return dict(zip(names, event.readings, strict=False))


def _logprobs(chat: Chat, tokens: Sequence[Event]) -> dict[str, Any] | None:
    if not chat.body.logprobs:
        return None
    return {"content": [token_logprob(chat.serving, event) for event in tokens], "refusal": None}


def token_logprob(serving: Serving, event: Event) -> dict[str, Any]:
    """A token with its log-probability and its likeliest rivals."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text = serving.model.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    top = [one(token, logprob) for token, logprob in event.top]
    return {**one(event.token, event.logprob or 0.0), "top_logprobs": top}


async def _frames(chat: Chat) -> AsyncGenerator[str]:
    """The chunks of a stream; an error becomes the last of them."""
    written = [Written(generation) for generation in chat.generations]
    calls = [0] * len(written)
    try:
        for index in range(len(written)):
            yield _chunk(chat, index, {"role": "assistant", "content": ""})
        waiting: dict[int, list[Event]] = {index: [] for index in range(len(written))}
        async for step in steps(written, chat.formats):
            if step.token is not None:
                waiting[step.index].append(step.token)
            for delta in _deltas(step, calls):
                tokens = waiting[step.index] if "content" in delta else []
                yield _chunk(chat, step.index, delta, tokens)
                if tokens:
                    waiting[step.index] = []
            if step.end is not None:
                finish = written[step.index].finish
                yield _chunk(chat, step.index, {}, waiting[step.index], finish)
        if chat.body.stream_options and chat.body.stream_options.include_usage:
            yield frame({**_chunk_head(chat), "choices": [], "usage": open_usage(written)})
    except Exception as error:
        yield frame(body_of(as_api_error(error), PATH))
    yield DONE


def _deltas(step: Step, calls: list[int]) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = []
    for part in step.parts:
        if isinstance(part, Reasoning):
            deltas.append({"reasoning_content": part.text})
        elif isinstance(part, Content):
            deltas.append({"content": part.text})
        else:
            deltas.append({"tool_calls": [{"index": calls[step.index], **tool_call(part)}]})
            calls[step.index] += 1
    return deltas


def _chunk_head(chat: Chat) -> dict[str, Any]:
    return {**chat.head, "object": "chat.completion.chunk", "system_fingerprint": None}


def _chunk(
    chat: Chat,
    index: int,
    delta: dict[str, Any],
    tokens: Sequence[Event] = (),
    finish: str | None = None,
) -> str:
    choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": finish}
    choice["logprobs"] = _logprobs(chat, tokens) if tokens else None
    extension: dict[str, Any] = {}
    if tokens:
        extension["steer"] = tokens[-1].steer
        if chat.steering.probes:
            extension["readings"] = [readings_of(chat.steering, event) for event in tokens]
    return frame({**_chunk_head(chat), "choices": [{**choice, **extension}]})
