"""Messages become the token ids of a prompt, through the model's own chat template.

Owns what is around a model's text: templates, thinking on or off, the context limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from mlxsteer.errors import ContextLengthError, ModelError, UsageError
from mlxsteer.plan import ANSWER, THINK
from mlxsteer.rows import Markers

if TYPE_CHECKING:
    from mlxsteer.model import Model

Messages = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]
# Off, on, or on with the model's own request for the greatest effort (DeepSeek-V4).
Thinking = bool | Literal["max"]
ROLES = ("system", "user", "assistant", "tool", "developer")


def messages_of(conversation: str | Sequence[Mapping[str, Any]]) -> Messages:
    """A question as one user message; messages checked for role and content."""
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    messages = [dict(message) for message in conversation]
    if not messages:
        raise UsageError("There are no messages. Give at least one from the user.")
    for message in messages:
        if message.get("role") not in ROLES:
            raise UsageError(f"A message has role {message.get('role')!r}: {', '.join(ROLES)}.")
        if not isinstance(message.get("content", ""), str):
            raise UsageError(f"The content of a {message['role']} message is not text.")
    return messages


def render(
    model: Model, messages: Messages, *, thinking: Thinking = False, tools: Tools | None = None
) -> list[int]:
    """Token ids of `messages` and the opening of the answer.

    tools: what the model may call, in OpenAI's form. Raises ContextLengthError; UsageError for
    tools where the model has no way to call one.
    """
    tokenizer = model.tokenizer
    if tools and not can_call_tools(model):
        raise UsageError(f"{model.label} has no format for calling tools. Leave `tools` out.")
    if is_v4(model):
        from mlxsteer.models.deepseek_v4 import chat_format

        release = "0731" if any(key.startswith("dspark_") for key in model.config) else "preview"
        effort = "max" if thinking == "max" else None
        tokens = chat_format.encode(
            messages,
            tokenizer,
            thinking=bool(thinking),
            effort=effort,
            tools=tools,
            release=release,
        )
    elif getattr(tokenizer, "has_chat_template", False):
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        if tokenizer.has_thinking:
            options["enable_thinking"] = bool(thinking)
        tokens = list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
        )
    else:
        raise ModelError(
            f"{model.label} has no chat template (it is a base model), so it cannot chat."
            " Choose an instruction-tuned model, or call model.logits on token ids."
        )
    return within_context(model, tokens)


def is_v4(model: Model) -> bool:
    """Whether the model brings no template, but our own chat format."""
    return model.stamp.get("architecture") == "deepseek_v4"


def can_think(model: Model, thinking: Thinking = True) -> bool:
    """Whether the model's template knows of thinking so."""
    if thinking == "max":
        return is_v4(model)
    return not thinking or is_v4(model) or bool(getattr(model.tokenizer, "has_thinking", False))


def can_call_tools(model: Model) -> bool:
    """Whether there is a format in which the model calls tools."""
    return is_v4(model) or bool(getattr(model.tokenizer, "has_tool_calling", False))


def markers(model: Model) -> Markers:
    """What opens and closes thoughts and tool calls in the model's output."""
    found = Markers.of(model.tokenizer)
    if not is_v4(model):
        return found
    from mlxsteer.models.deepseek_v4 import chat_format

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(model.tokenizer.encode(text, add_special_tokens=False))

    return replace(
        found,
        think_start=tokens(chat_format.THINK),
        think_end=tokens(chat_format.END_THINK),
        # The brackets around merge with what comes next to them, so they are left out.
        tool_start=tokens(chat_format.CALLS_OPEN.strip("<>").removesuffix("tool_calls")),
        tool_end=tokens(chat_format.CALLS_CLOSE.removesuffix(">")),
    )


def within_context(model: Model, tokens: list[int]) -> list[int]:
    """`tokens`, or ContextLengthError when they do not fit in the model's context."""
    limit = model.context_length
    if limit is not None and len(tokens) >= limit:
        raise ContextLengthError(
            f"The prompt has {len(tokens):,} tokens; {model.label} takes {limit:,}, answer"
            " included. Shorten it, or type /reset to start the chat again."
        )
    return tokens


def first_phase(model: Model, tokens: Sequence[int]) -> int:
    """THINK when the prompt ends by opening a thought, else ANSWER."""
    opening = model.markers.think_start
    if not opening:
        return ANSWER
    # Templates may put a newline after the marker.
    for start in range(len(tokens) - len(opening), max(-1, len(tokens) - len(opening) - 3), -1):
        if tuple(tokens[start : start + len(opening)]) == opening:
            closing = model.markers.think_end
            after = tuple(tokens[start + len(opening) :])
            return ANSWER if closing and after[: len(closing)] == closing else THINK
    return ANSWER
