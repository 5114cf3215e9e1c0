"""POST /v1/completions: a text continued, in OpenAI's older form. No chat template, no tools."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from mlxsteer.server.chat_completions import StreamOptions, bias_of, readings_of
from mlxsteer.server.errors import as_api_error, body_of
from mlxsteer.server.jobs import Event, Generation, Job
from mlxsteer.server.observe import note
from mlxsteer.server.parts import Format
from mlxsteer.server.running import Written, collect, steps
from mlxsteer.server.schemas import (
    Ignored,
    OpenSampledBody,
    Stops,
    Unsupported,
    one_or_many,
)
from mlxsteer.server.serving import Serving, Steering, serving_of
from mlxsteer.server.sse import DONE, EventStream, frame
from mlxsteer.server.usage import open_usage

router = APIRouter(tags=["generate"])
PATH = "/v1/completions"
PLAIN = Format()  # all text is content
MAX_LOGPROBS = 5


class CompletionBody(OpenSampledBody):
    """A text to be continued: words, or token ids."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1, le=10_000_000)] = 16
    n: Annotated[int | None, Field(ge=1, le=8)] = 1
    stop: str | Stops | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    echo: bool | None = False
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    stream_options: StreamOptions | None = None
    suffix: Unsupported
    best_of: Unsupported
    user: Ignored


@dataclass(frozen=True)
class Completion:
    """A completion on its way. prefix: the prompt's text, where it is to be echoed."""

    body: CompletionBody
    steering: Steering
    generations: Sequence[Generation]
    serving: Serving
    prefix: str

    @property
    def head(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self.generations[0].id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.serving.model.label,
            "system_fingerprint": None,
        }


@router.post(PATH, response_model=None)
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continue a text, whole or as a stream of server-sent events."""
    serving = serving_of(request)
    steering = await serving.steering(body)
    prompt = body.prompt
    tokens = await serving.tokenize(prompt) if isinstance(prompt, str) else prompt
    jobs = [_job(serving, body, tuple(tokens), steering, index) for index in range(body.n or 1)]
    generations = serving.submit(jobs)
    note(request, generations, steering.plan)
    prefix = await _echoed(serving, body, tokens)
    asked = Completion(body, steering, generations, serving, prefix)
    headers = steering.headers(generations)
    if body.stream:
        return EventStream(_frames(asked), generations, headers, serving.settings.keep_alive)
    written = await collect(request, generations, [PLAIN] * len(jobs))
    return JSONResponse(_whole(asked, written), headers=headers)


async def _echoed(serving: Serving, body: CompletionBody, tokens: Sequence[int]) -> str:
    if not body.echo:
        return ""
    if isinstance(body.prompt, str):
        return body.prompt
    return await serving.apart(lambda: str(serving.model.tokenizer.decode(list(tokens))))


def _job(
    serving: Serving, body: CompletionBody, prompt: tuple[int, ...], steering: Steering, index: int
) -> Job:
    return Job(
        prompt=prompt,
        plan=steering.plan,
        sampling=serving.sampling(body, body.max_tokens, index),
        stop=one_or_many(body.stop),
        logprobs=body.logprobs,
        logit_bias=bias_of(body.logit_bias),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        probes=steering.probes,
    )


def _whole(asked: Completion, written: Sequence[Written]) -> dict[str, Any]:
    choices = [
        _choice(asked, index, asked.prefix + answer.content, answer.tokens, answer.finish)
        for index, answer in enumerate(written)
    ]
    return {**asked.head, "choices": choices, "usage": open_usage(written)}


def _choice(
    asked: Completion, index: int, text: str, tokens: Sequence[Event], finish: str | None
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": finish}
    choice["logprobs"] = _logprobs(asked, tokens)
    if tokens and asked.steering.probes:
        choice["readings"] = [readings_of(asked.steering, event) for event in tokens]
    return choice


def _logprobs(asked: Completion, tokens: Sequence[Event]) -> dict[str, Any] | None:
    if asked.body.logprobs is None:
        return None
    decode = asked.serving.model.tokenizer.decode
    texts = [decode([event.token]) for event in tokens]
    starts = [len(asked.prefix) + sum(map(len, texts[:index])) for index in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [event.logprob for event in tokens],
        "top_logprobs": [{decode([t]): value for t, value in event.top} for event in tokens],
        "text_offset": starts,
    }


async def _frames(asked: Completion) -> AsyncGenerator[str]:
    written = [Written(generation) for generation in asked.generations]
    waiting: dict[int, list[Event]] = {index: [] for index in range(len(written))}
    try:
        if asked.prefix:
            for index in range(len(written)):
                yield frame(
                    {**asked.head, "choices": [_choice(asked, index, asked.prefix, [], None)]}
                )
        async for step in steps(written, [PLAIN] * len(written)):
            tokens = waiting[step.index]
            if step.token is not None:
                tokens.append(step.token)
            text = "".join(part.text for part in step.parts if hasattr(part, "text"))
            finish = written[step.index].finish if step.end else None
            if text or finish:
                choice = _choice(asked, step.index, text, tokens, finish)
                yield frame({**asked.head, "choices": [choice]})
                waiting[step.index] = []
        if asked.body.stream_options and asked.body.stream_options.include_usage:
            yield frame({**asked.head, "choices": [], "usage": open_usage(written)})
    except Exception as error:
        yield frame(body_of(as_api_error(error), PATH))
    yield DONE
