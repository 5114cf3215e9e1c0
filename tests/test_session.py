"""Conversations: cached turns equal turns run from nothing, whatever happened before.

The reference runs the model over the whole sequence for every token, with a new cache: no chat,
no generator, no reuse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlxsteer
from mlxsteer.errors import ContextLengthError, UsageError, VectorError
from mlxsteer.generation import Sampling
from mlxsteer.model import Model
from mlxsteer.session import Session
from tests.chat_models import END, WORDS, chat_folder, write_tokenizer
from tests.conversations import SHORT, expect_turn, from_nothing, keep_push, prompt_of, tokens_of
from tests.v4 import random_models


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return mlxsteer.load(str(chat_folder(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.fixture
def model(tiny: Model) -> Model:
    """The tiny model, with a vector `push` among the user's."""
    keep_push(tiny)
    return tiny


# --- the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["answer", "think", "generated", "prompt", "all"])
def test_cached_turns_equal_turns_from_nothing(model: Model, positions: str) -> None:
    session = Session(model, steer=f"push:1r@{positions}", sampling=SHORT, system="w1 w2")
    for text in ("w3 w4 w5", "w6", "w7 w8 w9 w10"):
        expect_turn(session, text)
    assert session.last.cached_tokens > 0


def test_steering_changes_the_answer(model: Model) -> None:
    """Or the tests here would compare nothing."""
    plain = tokens_of(Session(model, sampling=SHORT).ask("w3 w4"))
    assert tokens_of(Session(model, steer="push:1r", sampling=SHORT).ask("w3 w4")) != plain


def test_steering_may_change_between_turns(model: Model) -> None:
    session = Session(model, sampling=SHORT)
    for steer in (None, "push:1r@all", "push:-1r", "push:1r@prompt", None, "push:1r@all"):
        session.steer(steer)
        expect_turn(session, "w3 w4")


def test_default_positions_share_the_prompt_between_strengths(model: Model) -> None:
    session = Session(model, sampling=SHORT)
    expect_turn(session, "w3 w4")
    first = len(prompt_of(Session(model), "w3 w4"))
    session.steer("push:1r")
    expect_turn(session, "w5")
    assert session.last.cached_tokens >= first


def test_an_answer_that_was_not_steered_is_reused_too(model: Model) -> None:
    session = Session(model, sampling=SHORT)
    expect_turn(session, "w3 w4")
    before = session.last
    expect_turn(session, "w5")
    assert session.last.cached_tokens >= before.prompt_tokens + before.answer_tokens - 1


def test_a_reset_chat_is_a_new_one(model: Model) -> None:
    session = Session(model, steer="push:1r", sampling=SHORT)
    first = expect_turn(session, "w3 w4")
    session.reset()
    assert session.messages == []
    assert expect_turn(session, "w3 w4") == first


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next", "gemma3_text"])
@pytest.mark.parametrize("steer", [None, "push:1r", "push:1r@all"])
def test_caches_that_cannot_be_trimmed_are_right_too(
    tmp_path: Path, family: str, steer: str | None
) -> None:
    model = mlxsteer.load(str(chat_folder(tmp_path / family, family)))
    keep_push(model)
    session = Session(model, steer=steer, sampling=SHORT)
    for text in ("w3 w4 w5", "w6", "w7 w8"):
        expect_turn(session, text)
    assert session.last.cached_tokens > 0
    session.steer("push:-1r")
    expect_turn(session, "w9")


@pytest.mark.parametrize("steer", [None, "push:3r", "push:3r@all"])
@pytest.mark.parametrize("thinking", [False, True, "max"])
def test_v4_chats_are_right_too(tmp_path: Path, steer: str | None, thinking: bool | str) -> None:
    """Its cache compresses windows of tokens and can only go forward."""
    folder = random_models.write(tmp_path, "narrow", seed=0)
    vocabulary = random_models.config("narrow")["vocab_size"]
    write_tokenizer(folder, [f"w{index}" for index in range(vocabulary)])
    model = mlxsteer.load(str(folder))
    keep_push(model)
    session = Session(model, steer=steer, thinking=thinking, sampling=SHORT)
    for text in ("w3 w4 w5", "w6", "w7 w8"):
        expect_turn(session, text)
    assert session.last.cached_tokens > 0


def test_a_long_prompt_is_run_in_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxsteer.session.PREFILL_STEP", 5)
    session = Session(model, steer="push:1r@all", sampling=SHORT)
    seen: list[tuple[int, int]] = []
    prompt = prompt_of(session, "w3 " * 14)
    got = tokens_of(session.ask("w3 " * 14, on_prefill=lambda *done: seen.append(done)))
    assert got == from_nothing(model, prompt, "push:1r@all", 12)
    assert [done for done, _ in seen] == [5, 10, 15, 16]


def test_a_repetition_penalty_sees_the_cached_prompt(model: Model) -> None:
    """A turn answered from the cache is penalised as one that runs its whole prompt."""
    sampling = Sampling(max_tokens=12, repetition_penalty=1.5)
    session = Session(model, sampling=sampling)
    tokens_of(session.ask("w3 w4"))
    conversation = [*session.messages, {"role": "user", "content": "w5"}]
    whole = model.generate(conversation, sampling=sampling)
    assert "".join(piece.text for piece in session.ask("w5")) == whole


# --- live steering ------------------------------------------------------------------------------


def test_steering_may_change_within_an_answer(model: Model) -> None:
    """Tokens before the change stay; those after are of the new steering; the next turn is right.

    One token is always on its way when a piece is seen, so a change at piece 4 acts on 6.
    """
    session = Session(model, sampling=SHORT)
    prompt = prompt_of(session, "w3 w4")
    got = []
    for index, piece in enumerate(session.ask("w3 w4")):
        got += [piece.token] if piece.token >= 0 else []
        if index == 4:
            session.steer("push:1r")
    plain = from_nothing(model, prompt, None, 12)
    assert got[:6] == plain[:6]
    assert got != plain
    assert got == _switched(model, prompt, got[:6], 12)
    expect_turn(session, "w5")
    session.steer(None)
    expect_turn(session, "w6")


def _switched(model: Model, prompt: list[int], before: list[int], count: int) -> list[int]:
    """Greedy tokens after `before`, of which the last is the first steered position."""
    cache = model.make_cache()
    model.logits(prompt + before[:-1], cache=cache, prompt_length=len(prompt))
    tokens = list(before)
    while len(tokens) < count and tokens[-1] != END:
        logits = model.logits(tokens[-1:], "push:1r", cache, prompt_length=len(prompt))
        tokens.append(int(mx.argmax(logits[-1]).item()))
    return tokens


def test_a_plain_answer_leaves_the_chat_as_it_was(model: Model) -> None:
    session = Session(model, steer="push:1r", sampling=SHORT)
    expect_turn(session, "w3 w4")
    before = list(session.messages)
    prompt = prompt_of(session, "w5")
    assert tokens_of(session.ask_plain("w5")) == from_nothing(model, prompt, None, 12)
    assert session.messages == before
    expect_turn(session, "w5")
    assert session.last.cached_tokens == session.last.prompt_tokens - 1


@pytest.mark.parametrize("positions", ["answer", "think", "generated", "all"])
def test_thoughts_and_answers_are_told_apart_in_the_cache(model: Model, positions: str) -> None:
    """A template that repeats thoughts: rows of `</think>` must not be reused as others."""
    session = Session(model, steer=f"push:1r@{positions}", thinking=True, sampling=SHORT)
    session.messages = [
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w5", "reasoning_content": "w4"},
    ]
    for text in ("w6 w7", "w8"):
        expect_turn(session, text)


def test_the_end_of_a_thought_is_stamped_as_it_was_run(model: Model) -> None:
    """Its own row is already steered as answer, so a later prompt cannot take it."""
    session = Session(model, steer="push:1r@answer", thinking=True, sampling=SHORT)
    close = WORDS.index("</think>")
    with _saying(model, [10, 11, close, 12, END]):
        pieces = list(session.ask("w3"))
    assert [piece.thinking for piece in pieces] == [True, True, True, False, False]
    rows = dict(session._prefixes[0].rows)
    assert rows[10] == rows[11] == ""
    assert rows[close] == rows[12] != ""
    expect_turn(session, "w4")


class _saying:
    """Inside the block, the model says `tokens`, whatever it computes."""

    def __init__(self, model: Model, tokens: list[int]):
        self.steered, self.tokens = model.steered, tokens

    def __enter__(self) -> None:
        kind, tokens = type(self.steered), self.tokens
        said = iter(tokens)

        def call(steered: Any, batch: mx.array, cache: list[Any]) -> mx.array:
            row = cache[-1].rows[0]
            ends = row.seen + batch.shape[1] >= row.prompt_length
            logits = kind.__call__(steered, batch, cache)
            return logits + 1e6 * (mx.arange(64) == next(said, END)) if ends else logits

        self.steered.__class__ = type(kind.__name__, (kind,), {"__call__": call})
        self.kind = kind

    def __exit__(self, *error: object) -> None:
        self.steered.__class__ = self.kind


# --- what goes wrong ----------------------------------------------------------------------------


class _failing:
    """Inside the block, the model's forward pass number `at` raises, half way through."""

    def __init__(self, model: Model, at: int, error: type[BaseException] = RuntimeError):
        self.layer, self.left, self.error = model.network.layers[2], at, error

    def __enter__(self) -> None:
        original = type(self.layer)

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise self.error("the device gave up")
            return original.__call__(layer, *args, **kwargs)

        self.layer.__class__ = type(original.__name__, (original,), {"__call__": call})
        self.original = original

    def __exit__(self, *error: object) -> None:
        self.layer.__class__ = self.original


@pytest.mark.parametrize("at", [1, 2, 6])
def test_a_failed_turn_leaves_the_chat_as_it_was(model: Model, at: int) -> None:
    session = Session(model, steer="push:1r", sampling=SHORT)
    expect_turn(session, "w3 w4")
    before = list(session.messages)
    with _failing(model, at), pytest.raises(RuntimeError):
        list(session.ask("w5"))
    assert session.messages == before
    expect_turn(session, "w6")


def test_a_prompt_beyond_the_context_is_refused_and_nothing_is_lost(model: Model) -> None:
    session = Session(model, sampling=SHORT)
    expect_turn(session, "w3 w4")
    before = list(session.messages)
    with pytest.raises(ContextLengthError, match="takes 256"):
        list(session.ask("w5 " * 300))
    assert session.messages == before
    expect_turn(session, "w6")


def test_an_interrupted_answer_is_kept_as_far_as_it_came(model: Model) -> None:
    session = Session(model, steer="push:1r", sampling=SHORT)
    whole = tokens_of(Session(model, steer="push:1r", sampling=SHORT).ask("w3 w4"))
    pieces = session.ask("w3 w4")
    seen = [next(pieces) for _ in range(3)]
    pieces.close()
    assert [piece.token for piece in seen] == whole[:3]
    assert session.messages[-1]["content"] == "".join(p.text for p in seen).strip()
    assert session.last.finish_reason == "interrupted"
    session.steer(None)
    expect_turn(session, "w5")
    assert session.last.cached_tokens > 0


@pytest.mark.parametrize("at", [1, 2, 6])
def test_an_interrupt_within_a_pass_keeps_the_chat_right(model: Model, at: int) -> None:
    session = Session(model, sampling=SHORT)
    expect_turn(session, "w3 w4")
    with _failing(model, at, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        list(session.ask("w5"))
    assert len(session.messages) == (4 if at > 3 else 2)
    expect_turn(session, "w6")


def test_an_interrupt_while_the_prompt_is_read_keeps_what_was_read(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxsteer.session.PREFILL_STEP", 5)

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    session = Session(model, sampling=SHORT)
    with pytest.raises(KeyboardInterrupt):
        list(session.ask("w3 " * 14, on_prefill=stop))
    assert session.messages == []
    expect_turn(session, "w3 " * 14)
    assert session.last.cached_tokens == 10


def test_an_unknown_vector_leaves_the_steering(model: Model) -> None:
    session = Session(model, steer="push:1r")
    with pytest.raises(VectorError, match="Did you mean 'push'"):
        session.steer("pusj:3")
    assert str(session.plan) == "push:1r"


def test_the_greatest_effort_is_asked_for_where_the_model_knows_it(model: Model) -> None:
    with pytest.raises(UsageError, match="no maximum effort"):
        Session(model, thinking="max")
