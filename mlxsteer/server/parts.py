"""An answer's text taken apart while it arrives: thoughts, content, tool calls.

Works on text, since markers may be spread over tokens; what could be the beginning of a marker
is held back until it is decided.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlxsteer.errors import ModelError
from mlxsteer.plan import THINK
from mlxsteer.prompting import Tools, first_phase, is_v4

if TYPE_CHECKING:
    from mlxsteer.model import Model


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks."""

    text: str


@dataclass(frozen=True)
class Content:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True)
class Call:
    """A whole tool call; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


Part = Reasoning | Content | Call
Parse = Callable[[str], list[tuple[str, str]]]  # the text between the markers → (name, arguments)


@dataclass(frozen=True)
class Format:
    """How a model's answers are marked. Empty markers do not occur; thinking: how they begin."""

    think_start: str = ""
    think_end: str = ""
    call_start: str = ""
    call_end: str = ""
    parse: Parse | None = None
    thinking: bool = False


def format_of(model: Model, prompt: Sequence[int], tools: Tools | None) -> Format:
    """The format of the answer to `prompt`. Tool calls are looked for only with `tools`."""
    thinking = first_phase(model, prompt) == THINK
    if is_v4(model):
        from mlxsteer.models.deepseek_v4 import chat_format as v4

        plain = Format(v4.THINK, v4.END_THINK, thinking=thinking)
        if not tools:
            return plain
        return replace(plain, call_start=v4.CALLS_OPEN, call_end=v4.CALLS_CLOSE, parse=_v4_calls)
    tokenizer = model.tokenizer
    start, end = tokenizer.think_start or "", tokenizer.think_end or ""
    if not tools:
        return Format(start, end, thinking=thinking)
    parser = tokenizer.tool_parser

    def parse(text: str) -> list[tuple[str, str]]:
        return _mlx_calls(parser(text, list(tools)))

    opening, closing = tokenizer.tool_call_start, tokenizer.tool_call_end or ""
    return Format(start, end, opening, closing, parse, thinking)


def _v4_calls(text: str) -> list[tuple[str, str]]:
    from mlxsteer.models.deepseek_v4 import chat_format as v4

    answer = v4.parse(f"\n\n{v4.CALLS_OPEN}{text}{v4.CALLS_CLOSE}")
    return [(call.name, call.arguments) for call in answer.tool_calls]


def _mlx_calls(found: Any) -> list[tuple[str, str]]:
    """What mlx-lm's parsers return: one call or a list, arguments as an object."""
    calls = found if isinstance(found, list) else [found]
    named = []
    for call in calls:
        if not isinstance(call.get("arguments", {}), dict):
            raise ValueError("arguments are no object")
        arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
        named.append((str(call["name"]), arguments))
    return named


class Splitter:
    """Feed it text; it gives parts. State: what the text now belongs to."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self.state = "reasoning" if format.thinking else "content"
        self.calls = 0
        self._held = ""
        self._fresh = format.thinking  # just after a marker, where blanks are dropped
        self._tool = ""

    def feed(self, text: str) -> Iterator[Part]:
        """The parts that are decided after `text`."""
        self._held += text
        while (cut := self._next_marker()) is not None:
            start, marker = cut
            before, self._held = self._held[:start], self._held[start + len(marker) :]
            yield from self._give(before if self.state == "tool" else before.rstrip())
            yield from self._cross(marker)
        ready = len(self._held) - self._undecided()
        before, self._held = self._held[:ready], self._held[ready:]
        yield from self._give(before)

    def finish(self) -> Iterator[Part]:
        """What was held back; a tool call that was cut off comes as content."""
        text, self._held = self._held, ""
        yield from self._give(text)
        if self.state == "tool":
            yield from self._called(whole=not self.format.call_end)

    # --- markers -----------------------------------------------------------------------------

    def _markers(self) -> list[str]:
        marked = self.format
        found = {
            "reasoning": [marked.think_end],
            "tool": [marked.call_end],
            "content": [marked.think_start, marked.call_start],
        }[self.state]
        return [marker for marker in found if marker]

    def _next_marker(self) -> tuple[int, str] | None:
        hits = [(self._held.find(marker), marker) for marker in self._markers()]
        return min(((at, marker) for at, marker in hits if at >= 0), default=None)

    def _undecided(self) -> int:
        """How many characters at the end may belong to a marker, or are blanks before one."""
        held = self._held
        longest = 0
        for marker in self._markers():
            for size in range(min(len(marker) - 1, len(held)), 0, -1):
                if held.endswith(marker[:size]):
                    longest = max(longest, size)
                    break
        if self.state == "tool" or not self._markers():
            return longest
        body = held[: len(held) - longest]
        return len(held) - len(body.rstrip())

    def _cross(self, marker: str) -> Iterator[Part]:
        if self.state == "tool":
            yield from self._called(whole=True)
            self.state = "content"
        elif marker == self.format.call_start and self.state == "content":
            self.state = "tool"
        else:
            self.state = "reasoning" if self.state == "content" else "content"
        self._fresh = True

    # --- parts ---------------------------------------------------------------------------------

    def _give(self, text: str) -> Iterator[Part]:
        if self.state == "tool":
            self._tool += text
            return
        if self._fresh:
            text = text.lstrip()
        if text:
            self._fresh = False
            yield Reasoning(text) if self.state == "reasoning" else Content(text)

    def _called(self, *, whole: bool) -> Iterator[Part]:
        """The calls in the text between the markers, or that text where it holds none."""
        text, self._tool = self._tool, ""
        try:
            parse = self.format.parse
            found = parse(text) if whole and parse is not None else []
        except (ModelError, ValueError, KeyError, TypeError, AttributeError, SyntaxError):
            found = []
        if not found:
            yield Content(self.format.call_start + text + (self.format.call_end if whole else ""))
        for name, arguments in found:
            self.calls += 1
            yield Call(f"call_{uuid.uuid4().hex[:24]}", name, arguments)
