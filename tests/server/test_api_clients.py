"""The official clients against the running server: whole and streamed, and what they report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from mlxsteer.model import Model
from tests.server.api import HELLO, LIMIT, chat, post


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=LIMIT)


@pytest.fixture
def claude(address: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=address, api_key="none", max_retries=0, timeout=LIMIT)


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 6, **more}


@pytest.fixture
def plain(chatty: Model) -> str:
    """What the model answers without a server."""
    return chatty.generate(HELLO, max_tokens=6)


def test_chat_completion_is_the_models_own_answer(client: openai.OpenAI, plain: str) -> None:
    reply = client.chat.completions.create(**asked())
    assert reply.choices[0].message.content == plain
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 6
    assert reply.choices[0].finish_reason == "length"


def test_streamed_chat_adds_up_to_the_whole(client: openai.OpenAI, plain: str) -> None:
    stream = client.chat.completions.create(
        **asked(stream=True, stream_options={"include_usage": True})
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[-2].choices[0].finish_reason == "length"


@pytest.mark.parametrize("how", ["field", "suffix"])
def test_steering_in_a_field_or_in_the_models_name(
    client: openai.OpenAI, chatty: Model, push: Path, how: str, plain: str
) -> None:
    fields: dict[str, Any] = {"extra_body": {"steer": "push:4r"}} if how == "field" else {}
    name = "tiny" if how == "field" else "tiny+push:4r"
    raw = client.chat.completions.with_raw_response.create(**asked(**fields) | {"model": name})
    assert raw.headers["x-mlxsteer-steer"] == "push:4r"
    found = raw.parse().choices[0].message.content
    assert found == chatty.generate(HELLO, steer="push:4r", max_tokens=6)
    assert found != plain


def test_a_server_default_steers_requests_that_say_nothing(
    chatty: Model, push: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxsteer.server.engine import Engine
    from mlxsteer.server.settings import Settings
    from tests.server.api import running

    engine = Engine(chatty)
    engine.start()
    with running(engine, chatty, Settings(steer="push:4r")) as address:
        default = post(address, "/v1/chat/completions", chat("tiny"))
        off = post(address, "/v1/chat/completions", chat("tiny", steer="off"))
    assert default.headers["x-mlxsteer-steer"] == "push:4r"
    assert off.headers["x-mlxsteer-steer"] == "off"
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in (default, off)]
    assert texts[0] != texts[1]


def test_several_answers_with_a_seed_repeat(client: openai.OpenAI) -> None:
    def texts() -> list[str | None]:
        reply = client.chat.completions.create(**asked(n=3, seed=7, temperature=1.5))
        return [choice.message.content for choice in reply.choices]

    first = texts()
    assert first == texts()
    assert len(set(first)) > 1


def test_logprobs_name_the_chosen_token_first_when_greedy(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(**asked(logprobs=True, top_logprobs=3))
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    for token in logprobs.content:
        assert [token.token, token.logprob] == [
            token.top_logprobs[0].token,
            token.top_logprobs[0].logprob,
        ]


def test_streamed_logprobs_are_those_of_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**asked(logprobs=True)).choices[0].logprobs
    stream = client.chat.completions.create(**asked(logprobs=True, stream=True))
    found = [c.choices[0].logprobs for c in stream if c.choices]
    streamed = [token.token for each in found if each for token in each.content or []]
    assert whole is not None
    assert streamed == [token.token for token in whole.content or []]


def test_a_stop_text_ends_the_answer_and_is_left_out(client: openai.OpenAI, plain: str) -> None:
    word = plain.split()[2]
    reply = client.chat.completions.create(**asked(stop=word))
    assert reply.choices[0].finish_reason == "stop"
    assert word not in (reply.choices[0].message.content or "")


def test_logit_bias_forces_a_token(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(**asked(logit_bias={"20": 100}, max_tokens=2))
    assert reply.choices[0].message.content == "w14 w14"


def test_thoughts_are_apart_from_the_answer(client: openai.OpenAI) -> None:
    # Token 5 is </think>; held back until it is allowed, it comes at once.
    reply = client.chat.completions.create(**asked(reasoning_effort="high"))
    assert reply.choices[0].message.content == ""
    assert reply.choices[0].message.reasoning_content  # type: ignore[attr-defined]
    assert reply.usage is not None
    assert reply.usage.completion_tokens_details is not None
    assert reply.usage.completion_tokens_details.reasoning_tokens == 6


def test_a_repeated_prompt_comes_from_the_cache(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "w9 w8 w7 w6 w5 w4"}]
    client.chat.completions.create(**asked(messages=messages))
    usage = client.chat.completions.create(**asked(messages=messages)).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert 0 < (usage.prompt_tokens_details.cached_tokens or 0) < usage.prompt_tokens


def test_completion_continues_text_and_token_ids_alike(client: openai.OpenAI) -> None:
    text = client.completions.create(model="tiny", prompt="w1 w2", max_tokens=4, logprobs=2)
    ids = client.completions.create(model="tiny", prompt=[7, 8], max_tokens=4)
    assert text.choices[0].text == ids.choices[0].text
    logprobs = text.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == 4
    echoed = client.completions.create(model="tiny", prompt="w1 w2", max_tokens=4, echo=True)
    assert echoed.choices[0].text == f"w1 w2{ids.choices[0].text}"


def test_streamed_completion_adds_up(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="w1 w2", max_tokens=5)
    parts = client.completions.create(model="tiny", prompt="w1 w2", max_tokens=5, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_response_whole_and_streamed_agree(client: openai.OpenAI, plain: str) -> None:
    fields: dict[str, Any] = {"model": "tiny", "input": "w1 w2 w3", "max_output_tokens": 6}
    whole = client.responses.create(**fields)
    assert whole.output_text == plain
    assert whole.status == "incomplete"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 6
    events = list(client.responses.create(**fields, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == plain
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == plain  # type: ignore[union-attr]


def test_response_takes_earlier_items_back(client: openai.OpenAI, plain: str) -> None:
    first = client.responses.create(model="tiny", input="w1 w2 w3", max_output_tokens=6)
    items: list[Any] = [{"role": "user", "content": "w1 w2 w3"}]
    items += [item.model_dump(exclude_none=True) for item in first.output]
    items.append({"role": "user", "content": [{"type": "input_text", "text": "w4"}]})
    second = client.responses.create(model="tiny", input=items, max_output_tokens=4)
    turns = [*HELLO, {"role": "assistant", "content": plain}, {"role": "user", "content": "w4"}]
    chatted = client.chat.completions.create(**asked(messages=turns, max_tokens=4))
    assert second.output_text == chatted.choices[0].message.content


def test_message_whole_and_streamed_agree(claude: anthropic.Anthropic, plain: str) -> None:
    whole = claude.messages.create(**asked())
    assert whole.content[0].text == plain  # type: ignore[union-attr]
    assert whole.stop_reason == "max_tokens"
    with claude.messages.stream(**asked()) as stream:
        assert "".join(stream.text_stream) == plain
        final = stream.get_final_message()
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 6


def test_message_thinks_in_a_block_of_its_own(claude: anthropic.Anthropic) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with claude.messages.stream(**asked(thinking=thinking)) as stream:
        final = stream.get_final_message()
    assert final.content[0].type == "thinking"
    assert final.content[0].thinking


def test_message_names_the_stop_sequence(claude: anthropic.Anthropic, plain: str) -> None:
    word = plain.split()[2]
    reply = claude.messages.create(**asked(stop_sequences=[word]))
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", word)


def test_message_goes_on_from_the_assistants_beginning(
    claude: anthropic.Anthropic, plain: str
) -> None:
    begun = " ".join(plain.split()[:2])
    turns = [*HELLO, {"role": "assistant", "content": begun}]
    rest = claude.messages.create(**asked(messages=turns, max_tokens=4))
    assert f"{begun} {rest.content[0].text.strip()}" == plain  # type: ignore[union-attr]


def test_counted_tokens_are_those_that_a_message_uses(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model="tiny", messages=HELLO, system="w5 w6")  # type: ignore[arg-type]
    usage = claude.messages.create(**asked(system="w5 w6")).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_both_clients_list_the_model(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert [model.id for model in claude.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_raise_the_clients_own_exceptions(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    with pytest.raises(openai.NotFoundError, match="This server runs 'tiny'"):
        client.chat.completions.create(**asked() | {"model": "gpt-9"})
    with pytest.raises(anthropic.NotFoundError, match="This server runs 'tiny'"):
        claude.messages.create(**asked() | {"model": "claude-9"})
    with pytest.raises(openai.BadRequestError, match="no vector called 'nobody'"):
        client.chat.completions.create(**asked(extra_body={"steer": "nobody:3"}))
