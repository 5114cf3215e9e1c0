"""A tiny DeepSeek-V4 behind the API: tools in its prompt, calls and thoughts in its replies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import mlx.core as mx
import openai
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import mlxsteer
from mlxsteer.models.deepseek_v4 import chat_format as v4
from mlxsteer.server import decoding
from mlxsteer.server.choosing import Choice, Chosen
from mlxsteer.server.engine import Engine
from tests.server.api import running
from tests.v4 import random_models

CONTROL = [v4.BOS, v4.EOS, v4.USER, v4.ASSISTANT, v4.THINK, v4.END_THINK, "｜DSML｜"]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
ASK: Any = [{"role": "user", "content": "Rain?"}]
SAID: dict[str, Any] = {
    "role": "assistant",
    "reasoning_content": "let me look",
    "content": "One moment.",
    "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Ås", "days": 2}'}}],
}


def write_tokenizer(folder: Path) -> int:
    """A tokenizer of single bytes and V4's control tokens; how many tokens it has."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*CONTROL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": v4.EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine on a random V4 that writes in single bytes."""
    config = random_models.config("narrow") | {"vocab_size": write_tokenizer(tmp_path)}
    config |= {"eos_token_id": CONTROL.index(v4.EOS), "max_position_embeddings": 4096}
    save_file(random_models.tensors(config, 0), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = Engine(mlxsteer.load(str(tmp_path), dtype="float32"))
    engine.start()
    yield engine
    engine.close(0)


def speak(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the weights say, every answer in thinking mode is `SAID`."""
    rendered = v4.render([*ASK, SAID], thinking=True)
    answer = rendered.partition(v4.ASSISTANT + v4.THINK)[2]
    tokens = engine.model.tokenizer.encode(answer, add_special_tokens=False)
    real = decoding.choose

    def scripted(
        logits: mx.array, choices: Sequence[Choice], contexts: Sequence[Sequence[int]]
    ) -> Chosen:
        chosen = real(logits, choices, contexts)
        opened = [list(context[::-1]).index(CONTROL.index(v4.ASSISTANT)) for context in contexts]
        chosen.tokens = mx.array([tokens[distance - 1] for distance in opened])
        return chosen

    monkeypatch.setattr(decoding, "choose", scripted)


def test_v4s_tools_and_thoughts_go_through_the_api(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    speak(engine, monkeypatch)
    model = engine.model
    asked: dict[str, Any] = {"model": model.label, "messages": ASK, "max_tokens": 400}
    with running(engine, model) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        thinking = {"tools": [TOOL], "reasoning_effort": "high"}
        stream = client.chat.completions.create(**asked, **thinking, stream=True)
        chunks = list(stream)
        claude = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)
        message = claude.messages.create(
            **asked,
            tools=[{"name": "weather", "input_schema": WEATHER}],  # type: ignore[list-item]
            thinking={"type": "enabled", "budget_tokens": 1024},
        )
    _assert_prompt(engine, stream.response.headers["x-mlxsteer-generation"])
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    _assert_said([chunk.choices[0].delta.model_dump() for chunk in chunks])
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[-1].input == {"city": "Ås", "days": 2}  # type: ignore[union-attr]
    assert message.stop_reason == "tool_use"


def _assert_prompt(engine: Engine, id: str) -> None:
    """The tools stand in the prompt as V4's format has them."""
    generation = engine.generation(id)
    assert generation is not None
    prompt = engine.model.tokenizer.decode(list(generation.job.prompt))
    assert prompt == v4.render(ASK, thinking=True, tools=[TOOL])
    assert '"name": "weather"' in prompt


def _assert_said(deltas: list[dict[str, Any]]) -> None:
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == SAID[name]
    (call,) = [call for delta in deltas for call in delta["tool_calls"] or []]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Ås", "days": 2}
