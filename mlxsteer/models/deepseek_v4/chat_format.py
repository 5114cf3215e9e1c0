"""DeepSeek-V4's chat format: messages to text and ids, and an answer back to its parts (spec E).

The checkpoint ships no chat template; this is the source of truth, and `CHAT_TEMPLATE` says the
same in Jinja for other clients. Text that comes from messages is data: control tokens typed
into it are encoded as ordinary characters (`encode`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlxsteer.errors import ModelError
from mlxsteer.models.deepseek_v4.chat_template import BODY

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, END_THINK = "<think>", "</think>"
CALLS_OPEN, CALLS_CLOSE = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"

Release = Literal["preview", "0731"]
Effort = Literal["low", "high", "max"]
Message = Mapping[str, Any]

_THOROUGH = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to"
    " resolve the root cause, rigorously stress-testing your logic against all potential paths,"
    " edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step,"
    " considered alternative, and rejected hypothesis to ensure absolutely no assumption is left"
    " unchecked.\n\n"
)
_RELENTLESS = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance:"
    " exhaustively decompose the problem into its most fundamental components, trace every causal"
    " chain to its root, and resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple"
    " angles and are certain that no assumption remains unchecked and no error remains"
    " undiscovered.\n\n"
)
EFFORT_TEXT: dict[str, dict[str, str]] = {
    "preview": {"low": "", "high": "", "max": _THOROUGH},
    "0731": {"low": "", "high": _THOROUGH, "max": _RELENTLESS},
}

TOOLS_BEFORE = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning \
inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
TOOLS_AFTER = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
RESPONSE_FORMAT = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)


class _Data(str):
    """Text that came with a message, in which control tokens mean nothing."""


@dataclass(frozen=True)
class ToolCall:
    """One call that an answer makes; `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """An answer's text taken apart."""

    content: str
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


# -- messages to text -----------------------------------------------------------------------


def render(
    messages: Sequence[Message],
    *,
    thinking: bool = False,
    effort: Effort | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    drop_thinking: bool = True,
    release: Release = "preview",
) -> str:
    """The prompt's text, up to and with the opening of the answer.

    Args:
        messages: OpenAI-style; roles system, user, assistant, tool, developer, latest_reminder.
        effort: how long to think; only with `thinking`. The releases mean different texts.
        tools: OpenAI-style tool list, put on the system message.
        drop_thinking: leave out the reasoning of turns before the last question (never done
            where tools are used).
    Raises: ModelError on an unknown role or effort, or arguments that are no JSON object.
    """
    return "".join(
        _parts(messages, thinking, effort, tools, drop_thinking=drop_thinking, release=release)
    )


def encode(messages: Sequence[Message], tokenizer: Any, **options: Any) -> list[int]:
    """Token ids of `render(messages, **options)`; control tokens in the messages are plain text.

    `tokenizer` is a Hugging Face tokenizer of the model, or mlx-lm's wrapper of one.
    """
    control = re.compile("|".join(re.escape(t) for t in tokenizer.get_added_vocab()))
    options = {"thinking": False, "effort": None, "tools": None} | options
    ids: list[int] = []
    for text in _uncontrolled(_parts(messages, **options), control):
        ids += tokenizer.encode(text, add_special_tokens=False)
    return ids


def _uncontrolled(parts: Iterator[str], control: re.Pattern[str]) -> list[str]:
    """The text, cut inside every control token that stands in message data."""
    pieces = [""]
    for part in parts:
        while isinstance(part, _Data) and (found := control.search(part)):
            cut = found.start() + 1
            pieces[-1] += part[:cut]
            pieces.append("")
            part = _Data(part[cut:])
        pieces[-1] += part
    return pieces


def _parts(
    messages: Sequence[Message],
    thinking: bool,
    effort: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
    drop_thinking: bool = True,
    release: str = "preview",
) -> Iterator[str]:
    turns = _turns(_with_tools(messages, tools))
    drop = drop_thinking and not any(t.get("tools") for t in turns)
    last = max((i for i, t in enumerate(turns) if t["role"] in _ASKING), default=-1)
    if thinking and drop:
        kept = [t for i, t in enumerate(turns) if i >= last or t["role"] != "developer"]
        last -= len(turns) - len(kept)
        turns = kept
    yield BOS
    yield _effort_text(effort, release) if thinking else ""
    for i, turn in enumerate(turns):
        reasons = thinking and (not drop or i >= last)
        yield from _turn(turn, reasons)
        follows = turns[i + 1]["role"] if i + 1 < len(turns) else "assistant"
        if turn["role"] in _ASKING and follows in ("assistant", "latest_reminder"):
            yield ASSISTANT + (THINK if reasons else END_THINK)


_ASKING = ("user", "developer")


def _effort_text(effort: str | None, release: str) -> str:
    texts = EFFORT_TEXT[release]
    if effort is not None and effort not in texts:
        raise ModelError(f"Unknown reasoning effort {effort!r}: {', '.join(texts)}.")
    return texts[effort or "low"]


def _with_tools(messages: Sequence[Message], tools: Any) -> list[dict[str, Any]]:
    """A copy of the messages, with `tools` on the first system message."""
    copies = [dict(m) for m in messages]
    if not tools:
        return copies
    if not copies or copies[0]["role"] != "system":
        copies.insert(0, {"role": "system", "content": ""})
    copies[0]["tools"] = list(tools)
    return copies


def _turns(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring user and tool messages joined to one turn, results in the order of calls."""
    turns: list[dict[str, Any]] = []
    order: dict[Any, int] = {}
    for message in messages:
        role = message["role"]
        if role == "assistant":
            order = {c.get("id"): i for i, c in enumerate(message.get("tool_calls") or [])}
        if role not in ("user", "tool"):
            turns.append(message)
            continue
        if not turns or "blocks" not in turns[-1]:
            turns.append({"role": "user", "blocks": [], "order": order})
        turns[-1]["blocks"].append(message)
    return turns


def _turn(turn: dict[str, Any], reasons: bool) -> Iterator[str]:
    """One turn, without the opening of the next."""
    role = turn["role"]
    if "blocks" in turn:
        yield USER
        yield from _user_blocks(turn)
    elif role == "assistant":
        yield from _assistant(turn, reasons)
    elif role in _OPENINGS:
        yield _OPENINGS[role]
        yield _Data(turn.get("content") or "")
        yield from _instructions(turn)
    else:
        known = ", ".join((*_OPENINGS, "user", "assistant", "tool"))
        raise ModelError(f"A message has role {role!r}; DeepSeek-V4 knows {known}.")


_OPENINGS = {"system": "", "developer": USER, "latest_reminder": REMINDER}


def _user_blocks(turn: dict[str, Any]) -> Iterator[str]:
    blocks, order = turn["blocks"], turn["order"]
    results = iter(
        sorted(
            (b for b in blocks if b["role"] == "tool"),
            key=lambda b: order.get(b.get("tool_call_id"), 0),
        )
    )
    for i, block in enumerate(blocks):
        yield "\n\n" if i else ""
        if block["role"] == "tool":
            yield "<tool_result>"
            yield _Data(next(results).get("content") or "")
            yield "</tool_result>"
        else:
            yield _Data(block.get("content") or "")


def _instructions(turn: dict[str, Any]) -> Iterator[str]:
    """Tools and response format, after the content they came with."""
    if turn.get("tools"):
        yield "\n\n" + TOOLS_BEFORE
        yield _Data("\n".join(_json(t.get("function", t)) for t in turn["tools"]))
        yield TOOLS_AFTER
    if turn.get("response_format"):
        yield "\n\n" + RESPONSE_FORMAT
        yield _Data(_json(turn["response_format"]))


def _assistant(turn: dict[str, Any], reasons: bool) -> Iterator[str]:
    if reasons:
        yield _Data(turn.get("reasoning_content") or turn.get("reasoning") or "")
        yield END_THINK
    yield _Data(turn.get("content") or "")
    if turn.get("tool_calls"):
        yield f"\n\n{CALLS_OPEN}\n"
        for call in turn["tool_calls"]:
            yield from _invoke(call.get("function", call))
        yield CALLS_CLOSE
    yield EOS if not turn.get("wo_eos") else ""


def _invoke(function: Mapping[str, Any]) -> Iterator[str]:
    yield '<｜DSML｜invoke name="'
    yield _Data(function["name"])
    yield '">\n'
    for name, value in _arguments(function).items():
        is_text = isinstance(value, str)
        yield '<｜DSML｜parameter name="'
        yield _Data(name)
        yield f'" string="{"true" if is_text else "false"}">'
        yield _Data(value if is_text else _json(value))
        yield "</｜DSML｜parameter>\n"
    yield "</｜DSML｜invoke>\n"


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    given = function.get("arguments") or {}
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, Mapping):
        raise ModelError(
            f"The arguments of the tool call {function['name']!r} are not a JSON object: {given!r}."
        )
    return arguments


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# -- an answer to its parts -----------------------------------------------------------------

_INVOKE = re.compile(r'<｜DSML｜invoke name="(.*?)">\n(.*?)</｜DSML｜invoke>\n?', re.DOTALL)
_PARAMETER = re.compile(
    r'<｜DSML｜parameter name="(.*?)" string="(true|false)">(.*?)</｜DSML｜parameter>\n?', re.DOTALL
)


def parse(text: str, *, thinking: bool = False) -> Answer:
    """Reasoning, content and tool calls of an answer's text.

    Args:
        text: what the model wrote after the prompt of `render`.
        thinking: the value that `render` was given.
    Raises: ModelError where the answer begins tool calls that do not follow the format.
    """
    text = text.removesuffix(EOS)
    reasoning = ""
    if thinking:
        reasoning, closed, text = text.partition(END_THINK)
        if not closed:  # cut off while thinking
            return Answer("", reasoning)
    content, calls, rest = text.partition(f"\n\n{CALLS_OPEN}")
    if not calls:
        return Answer(content, reasoning)
    body, closed, _ = rest.partition(CALLS_CLOSE)
    if not closed:
        raise ModelError("The answer was cut off inside a tool call. Allow more tokens.")
    return Answer(content, reasoning, _parse_calls(body))


def _parse_calls(body: str) -> list[ToolCall]:
    left = _INVOKE.sub("", body).strip()
    if left:
        raise ModelError(f"The answer's tool call does not follow the format: {left[:80]!r}.")
    return [ToolCall(name, _parse_arguments(inner)) for name, inner in _INVOKE.findall(body)]


def _parse_arguments(inner: str) -> str:
    left = _PARAMETER.sub("", inner).strip()
    if left:
        raise ModelError(f"A tool call's parameters do not follow the format: {left[:80]!r}.")
    fields = [
        f"{_json(name)}: {_json(value) if is_text == 'true' else value}"
        for name, is_text, value in _PARAMETER.findall(inner)
    ]
    arguments = "{" + ", ".join(fields) + "}"
    try:
        json.loads(arguments)
    except json.JSONDecodeError as error:
        raise ModelError(f"A tool call's arguments are not JSON: {arguments[:80]!r}.") from error
    return arguments


# -- the same for other clients -------------------------------------------------------------


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


_NAMES = (
    "TOOLS_BEFORE TOOLS_AFTER RESPONSE_FORMAT BOS EOS USER ASSISTANT REMINDER THINK END_THINK"
    " CALLS_OPEN CALLS_CLOSE"
).split()


def chat_template(release: Release = "preview") -> str:
    """The format as a Jinja chat template (keywords `enable_thinking`, `reasoning_effort`)."""
    texts = EFFORT_TEXT[release]
    effort = "{" + ", ".join(f'"{k}": {_quoted(v)}' for k, v in texts.items()) + "}"
    constants = [f"{{%- set {name} = {_quoted(globals()[name])} -%}}" for name in _NAMES]
    return "\n".join([*constants, f"{{%- set EFFORT = {effort} -%}}"]) + BODY


CHAT_TEMPLATE = chat_template()
