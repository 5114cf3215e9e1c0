"""Tool calls, from a scripted answer to each API's form; and thoughts beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from mlxsteer.model import Model
from mlxsteer.models.deepseek_v4 import chat_format as v4
from mlxsteer.server.parts import Call, Content, Format, Reasoning, Splitter
from mlxsteer.server.parts import _mlx_calls as mlx_calls
from mlxsteer.server.parts import _v4_calls as v4_calls
from tests.server.api import HELLO, ScriptedEngine, running

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]


def parse(text: str) -> list[tuple[str, str]]:
    return mlx_calls(json.loads(text))


JSON_TOOLS = Format("<think>", "</think>", "<tool_call>", "</tool_call>", parse)
V4 = Format(v4.THINK, v4.END_THINK, v4.CALLS_OPEN, v4.CALLS_CLOSE, v4_calls, thinking=True)


def split(format: Format, text: str, size: int) -> tuple[str, str, list[tuple[str, Any]]]:
    """(reasoning, content, calls) of `text` fed `size` characters at a time."""
    splitter = Splitter(format)
    parts = []
    for start in range(0, len(text), size):
        parts += list(splitter.feed(text[start : start + size]))
    parts += list(splitter.finish())
    calls = [(p.name, json.loads(p.arguments)) for p in parts if isinstance(p, Call)]
    return (
        "".join(p.text for p in parts if isinstance(p, Reasoning)),
        "".join(p.text for p in parts if isinstance(p, Content)),
        calls,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_parts_do_not_depend_on_how_the_text_arrives(size: int) -> None:
    text = f"<think>\nhm </th ink</think>\n\nFine.\n<tool_call>{json.dumps(CALL)}</tool_call>"
    expected = ("hm </th ink", "Fine.", [("weather", {"city": "Oslo"})])
    assert split(JSON_TOOLS, text, size) == expected


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_v4_calls_are_parsed_by_its_own_format(size: int) -> None:
    message = {
        "role": "assistant",
        "reasoning_content": "let me look",
        "content": "One moment.",
        "tool_calls": [
            {"function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}},
            {"function": {"name": "clock", "arguments": "{}"}},
        ],
    }
    rendered = v4.render([{"role": "user", "content": "?"}, message], thinking=True)
    answer = rendered.partition(f"{v4.ASSISTANT}{v4.THINK}")[2].removesuffix(v4.EOS)
    calls = [("weather", {"city": "Oslo", "days": 2}), ("clock", {})]
    assert split(V4, answer, size) == ("let me look", "One moment.", calls)


@pytest.mark.parametrize(
    "text",
    ["<tool_call>{oops}</tool_call>", '<tool_call>{"name": "weat', "a <tool", "b  \n", "<think"],
)
def test_what_is_no_whole_call_comes_as_it_was_written(text: str) -> None:
    for size in (1, 4):
        assert split(JSON_TOOLS, text, size) == ("", text, [])


# --- each API's form -------------------------------------------------------------------------


@pytest.fixture
def caller(chatty: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ScriptedEngine]]:
    """A server whose model thinks, says a word and calls a tool."""
    tokenizer = chatty.tokenizer
    monkeypatch.setattr(tokenizer, "_tool_call_start", "<tool_call>")
    monkeypatch.setattr(tokenizer, "_tool_call_end", "</tool_call>")
    monkeypatch.setattr(tokenizer, "_tool_parser", lambda text, tools: json.loads(text))
    written = f"<think> hm </think> Well. <tool_call>{json.dumps(CALL)}</tool_call>"
    texts = [written[start : start + 5] for start in range(0, len(written), 5)]
    engine = ScriptedEngine(chatty, texts)
    with running(engine, chatty) as address:
        yield address, engine


def test_chat_completion_with_a_call(caller: tuple[str, ScriptedEngine]) -> None:
    client = openai.OpenAI(base_url=f"{caller[0]}/v1", api_key="none", max_retries=0)
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": TOOLS}
    choice = client.chat.completions.create(**fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "weather",
        {"city": "Oslo"},
    )
    assert choice.message.content == "Well."
    assert choice.message.reasoning_content == "hm"  # type: ignore[attr-defined]
    chunks = list(client.chat.completions.create(**fields, stream=True))
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [(c.index, c.function and c.function.name) for c in calls] == [(0, "weather")]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_without_tools_the_text_is_left_alone(caller: tuple[str, ScriptedEngine]) -> None:
    client = openai.OpenAI(base_url=f"{caller[0]}/v1", api_key="none", max_retries=0)
    choice = client.chat.completions.create(
        model="tiny",
        messages=HELLO,  # type: ignore[arg-type]
        tools=TOOLS,
        tool_choice="none",
    ).choices[0]
    assert "<tool_call>" in (choice.message.content or "")
    assert choice.finish_reason == "stop"


def test_response_with_a_call(caller: tuple[str, ScriptedEngine]) -> None:
    client = openai.OpenAI(base_url=f"{caller[0]}/v1", api_key="none", max_retries=0)
    tools: list[Any] = [{"type": "function", "name": "weather", "parameters": WEATHER}]
    fields: dict[str, Any] = {"model": "tiny", "input": "w1", "tools": tools}
    whole = client.responses.create(**fields)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    streamed = list(client.responses.create(**fields, stream=True))[-1]
    assert streamed.type == "response.completed"
    kinds = [(item.type, getattr(item, "name", None)) for item in streamed.response.output]
    assert kinds == [("reasoning", None), ("message", None), ("function_call", "weather")]
    assert streamed.response.output_text == "Well."


def test_message_with_a_call_and_its_result(caller: tuple[str, ScriptedEngine]) -> None:
    address, engine = caller
    client = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)
    tools: list[Any] = [{"name": "weather", "input_schema": WEATHER}]
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 50, "tools": tools}
    whole = client.messages.create(**fields, messages=HELLO)
    assert whole.stop_reason == "tool_use"
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    with client.messages.stream(**fields, messages=HELLO) as stream:
        final = stream.get_final_message()
    use = final.content[-1]
    assert use.type == "tool_use"
    assert (use.name, use.input) == ("weather", {"city": "Oslo"})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "w7"}
    turns: list[Any] = [*HELLO, {"role": "assistant", "content": final.content}]
    turns.append({"role": "user", "content": [result, {"type": "text", "text": "w8"}]})
    client.messages.create(**fields, messages=turns)
    tokenizer = engine.model.tokenizer
    prompt = tokenizer.decode(list(engine.jobs[-1].prompt))
    assert "w7" in prompt
    assert "w8" in prompt
