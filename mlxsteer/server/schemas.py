"""What requests may hold: the fields that every API here shares, and how strictly they are read.

A field that is not listed is an error, so nothing asked for is silently left undone. Fields that
only matter to a hosted service are listed as `Ignored` and change nothing.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_DEPTH = 32
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_METERS = 8
_HALF_PAIR = re.compile("[\ud800-\udfff]")


def _check_shape(data: Any) -> None:
    """ValueError for JSON that is nested too deep, or whose texts no encoding can carry."""
    level = [data]
    for _ in range(MAX_DEPTH):
        texts = [item for item in level if isinstance(item, str)]
        if any(_HALF_PAIR.search(text) for text in texts):
            raise ValueError("a text holds half a surrogate pair, which is no character")
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _children(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return [*item, *item.values()]
    return item if isinstance(item, list) else []


class Body(BaseModel):
    """A request body: no unknown field, no NaN, no conversions, nothing nested without end."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _shape(cls, data: Any) -> Any:
        _check_shape(data)
        return data


class Loose(BaseModel):
    """A part of a body whose unknown fields are notes of the client's own."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)


def _no_value(value: Any) -> None:
    if value not in (None, [], {}):
        raise ValueError("this server cannot do that; leave the field out")


Ignored = Annotated[Any, Field(default=None, description="Accepted; changes nothing here.")]
Unsupported = Annotated[
    None,
    BeforeValidator(_no_value),
    Field(default=None, description="Not supported: only null is accepted."),
]

Name = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=MAX_STOPS)
]


def text_only(what: str) -> BeforeValidator:
    """A validator of a format field that takes `{"type": "text"}` and nothing else."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") not in (None, "text"):
            raise ValueError(
                f"{value.get('type')!r} is not supported: this server does not constrain {what}."
                " Ask for JSON in the prompt and leave the field out"
            )
        return value

    return BeforeValidator(check)


class TextFormat(Loose):
    """The only format of answers: text."""

    type: Literal["text"] = "text"


class SteeredBody(Body):
    """The steering fields, taken by every endpoint that generates."""

    steer: Annotated[
        str | None,
        Field(
            max_length=2000,
            description="Steering text such as `terse:3, formal:-1@think`; empty means none."
            " Strengths: 1 a hint, 3 clear, 5 the edge. Names are those of"
            " GET /v1/steering/vectors. Default: what the server was started with.",
        ),
    ] = None
    meter: Annotated[
        list[Name],
        Field(
            max_length=MAX_METERS,
            description="Vectors to read at every token. `readings` then come with each streamed"
            " chunk that writes text, one {vector: number} a token.",
        ),
    ] = Field(default_factory=list)


class SampledBody(SteeredBody):
    """The sampling fields."""

    model: Annotated[
        str,
        Field(
            max_length=2200,
            description="The served model (GET /v1/models), optionally with steering:"
            " `demo+terse:3`.",
        ),
    ]
    stream: bool | None = False
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, le=1_000_000)] = None


class OpenSampledBody(SampledBody):
    """More sampling fields, as the OpenAI-shaped endpoints take them."""

    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None


def one_or_many(value: str | list[str] | None) -> tuple[str, ...]:
    """A field that takes one text or a list of them."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)
