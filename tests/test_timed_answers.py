"""Conditions and schedules in answers: streamed, in batches, in chats, in mlx-lm's generators.

The reference runs the model over the whole sequence for every token, with a new cache.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator

import mlxsteer
from mlxsteer import library
from mlxsteer.errors import UsageError, VectorError
from mlxsteer.generation import Sampling, generate_batch, stream
from mlxsteer.model import Model
from mlxsteer.plan import Plan
from mlxsteer.session import Session
from mlxsteer.steered import SteeredModel
from mlxsteer.vector import SteeringVector
from tests.chat_models import chat_folder, random_directions

QUESTIONS = ("w1 w2", "w3 w4 w5 w6 w7 w8 w9", "w10", "w11 w12 w13", "w14 w15")
CODE, PUSH = random_directions(7, name="code"), random_directions(0)
STEERS = (
    "push:1r@first(5)",
    "push:1r@after(5)",
    "push:2r@decay(4)",
    "push:1r@when(code>0)",
    "push:1r@when(code@1<0)@decay(9), code:1r@generated@after(2)",
)
SHORT = Sampling(max_tokens=14)


@pytest.fixture
def model(tiny: Model) -> Model:
    """The tiny model with `push` and `code` among the user's vectors."""
    for vector in (PUSH, CODE):
        library.save(vector, tiny.key)
    return tiny


def from_nothing(model: Model, prompt: list[int], plan: Plan, count: int) -> list[int]:
    """Greedy tokens without the end token, each from a pass over the whole sequence."""
    tokens: list[int] = []
    while len(tokens) < count:
        logits = model.logits(prompt + tokens, plan, prompt_length=len(prompt))
        token = int(mx.argmax(logits[-1]).item())
        if token in model.tokenizer.eos_token_ids:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("steer", STEERS)
def test_a_streamed_answer_is_that_of_whole_passes(model: Model, steer: str) -> None:
    prompt, plan = model.render(QUESTIONS[1]), model.plan(steer)
    pieces = stream(model, prompt, plan, SHORT)
    tokens = [piece.token for piece in pieces if piece.finish_reason is None]
    assert tokens == from_nothing(model, prompt, plan, 14)
    always = model.plan(steer.partition("@")[0])
    assert tokens != from_nothing(model, prompt, always, 14)
    assert tokens != from_nothing(model, prompt, Plan([]), 14)


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_rows_of_a_batch_answer_as_they_do_from_nothing(family: str, tmp_path: Path) -> None:
    chatty = mlxsteer.load(str(chat_folder(tmp_path / family, family)))
    for vector in (PUSH, CODE):
        library.save(vector, chatty.key)
    plans = [chatty.plan(steer) for steer in STEERS]
    prompts = [chatty.render(question) for question in QUESTIONS]
    together = generate_batch(chatty, prompts, plans, SHORT)
    for answer, prompt, plan in zip(together, prompts, plans, strict=True):
        assert answer.tokens == from_nothing(chatty, prompt, plan, 14)


def test_mlx_lms_batch_generator_carries_the_gates(model: Model) -> None:
    """Rows that leave at other times, and rows inserted later."""
    steered = SteeredModel(model.hooks)
    plans = [model.plan(steer) for steer in STEERS]
    prompts = [model.render(question) for question in QUESTIONS]
    counts = [9, 4, 12, 13, 10]
    generator = BatchGenerator(steered, completion_batch_size=3, prefill_batch_size=2)
    found: dict[int, list[int]] = {}
    uids: list[int] = []

    def insert(rows: range) -> None:
        caches = [steered.new_cache(model.row(plans[i], len(prompts[i]))) for i in rows]
        uids.extend(
            generator.insert([prompts[i] for i in rows], [counts[i] for i in rows], caches=caches)
        )

    insert(range(3))
    while responses := generator.next_generated():
        for response in responses:
            found.setdefault(response.uid, []).append(response.token)
        if len(uids) == 3 and any(response.finish_reason for response in responses):
            insert(range(3, 5))
    generator.close()
    ends = model.tokenizer.eos_token_ids
    for uid, prompt, plan, count in zip(uids, prompts, plans, counts, strict=True):
        tokens = found[uid]  # it goes on past an end token
        end = next((at for at, token in enumerate(tokens) if token in ends), count)
        assert tokens[:end] == from_nothing(model, prompt, plan, count)[:end]


def test_each_turn_of_a_chat_counts_anew(model: Model) -> None:
    for steer in (STEERS[0], STEERS[3]):
        session = Session(model, steer=steer, sampling=SHORT)
        for question in QUESTIONS[:3]:
            prompt = model.render([*session.messages, {"role": "user", "content": question}])
            pieces = [piece.token for piece in session.ask(question)]
            expected = from_nothing(model, prompt, session.plan, 14)
            assert pieces[: len(expected)] == expected
        assert session.last.cached_tokens > 0


def test_a_chat_with_conditions_is_saved_and_loaded(model: Model, tmp_path: Path) -> None:
    session = Session(model, steer=STEERS[4], sampling=SHORT)
    list(session.ask("w1"))
    session.save(tmp_path / "chat.json")
    again = Session(model)
    again.load(tmp_path / "chat.json")
    assert again.plan.key == session.plan.key


def test_states_are_captured_under_a_schedule(model: Model) -> None:
    """The last position of a prompt gives the first token: `first` acts there, `after` does not."""
    tokens = model.render(QUESTIONS[1])
    steers = (None, "push:1r", "push:1r@first(1)", "push:1r@after(1)")
    plain, steady, first, after = (
        np.array(model.capture(tokens, steer=steer)["residual"]) for steer in steers
    )
    assert np.array_equal(first, steady)
    assert np.array_equal(after, plain)
    assert not np.allclose(first, plain)


def test_a_condition_on_given_arrays_reads_them(model: Model) -> None:
    mine = SteeringVector.from_arrays(
        {1: 3 * PUSH.directions[1]}, n_layers=model.n_layers, name="mine"
    )
    (gate,) = model.plan([(mine, "1r@when(mine<0)")]).gates
    assert (gate.probe.name, gate.probe.layer) == ("mine", 1)


def test_what_cannot_be_read_is_an_error(model: Model) -> None:
    with pytest.raises(VectorError, match="no vector or contrast set called 'cod'"):
        model.plan("push:1r@when(cod>0)")
    with pytest.raises(UsageError, match="no direction at layer 9"):
        model.plan("push:1r@when(code@9>0)")
