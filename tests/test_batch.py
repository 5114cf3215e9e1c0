"""Fixed batches: every row gets what it would get alone, whoever sits beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlxsteer
from mlxsteer.generation import Sampling, generate_batch, stream
from mlxsteer.model import Model
from mlxsteer.plan import Plan
from tests.chat_models import chat_folder, random_directions

QUESTIONS = ("w1 w2", "w3 w4 w5 w6 w7 w8 w9", "w10", "w11 w12 w13", "w14 w15 w16 w17 w18")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return mlxsteer.load(str(chat_folder(tmp_path_factory.mktemp("models") / "tiny")))


def _plans(model: Model) -> list[Plan]:
    first, second = random_directions(0), random_directions(1, name="pull")
    steers = (None, (first, "1r"), (second, "-2r@all"), (first, "1r@prompt"), [(first, "1r")])
    return [model.plan(steer) for steer in steers]


def _alone(model: Model, question: str, plan: Plan, sampling: Sampling) -> list[int]:
    pieces = stream(model, model.render(question), plan, sampling)
    return [piece.token for piece in pieces if piece.finish_reason is None]


def test_differently_steered_rows_answer_as_they_do_alone(model: Model) -> None:
    sampling = Sampling(max_tokens=20)
    plans, prompts = _plans(model), [model.render(question) for question in QUESTIONS]
    together = generate_batch(model, prompts, plans, sampling)
    alone = [_alone(model, q, plan, sampling) for q, plan in zip(QUESTIONS, plans, strict=True)]
    assert [answer.tokens for answer in together] == alone
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


def test_steering_a_row_leaves_its_unsteered_neighbours_as_they_were(model: Model) -> None:
    sampling, prompt = Sampling(max_tokens=20), model.render(QUESTIONS[0])
    plain, steered = model.plan(None), model.plan((random_directions(0), "4r@all"))
    quiet = generate_batch(model, [prompt] * 3, [plain] * 3, sampling)
    loud = generate_batch(model, [prompt] * 3, [plain, steered, plain], sampling)
    assert loud[0] == quiet[0]
    assert loud[2] == quiet[2]
    assert loud[1] != quiet[1]


def test_rows_end_at_their_end_token_or_at_the_limit(model: Model) -> None:
    prompts = [model.render(question) for question in QUESTIONS]
    finished: list[int] = []
    answers = generate_batch(
        model, prompts, [model.plan(None)] * 5, Sampling(max_tokens=7), on_tokens=finished.append
    )
    ends = set(model.tokenizer.eos_token_ids)
    assert sum(finished) == 5
    for answer in answers:
        assert not ends & set(answer.tokens)
        assert (len(answer.tokens) == 7) == (answer.finish_reason == "length")
        assert answer.ended == (answer.finish_reason == "stop")


def test_a_repetition_penalty_acts_on_each_row_alone(model: Model) -> None:
    sampling = Sampling(max_tokens=12, repetition_penalty=1.5)
    plans, prompts = _plans(model), [model.render(question) for question in QUESTIONS]
    together = generate_batch(model, prompts, plans, sampling)
    alone = [_alone(model, q, plan, sampling) for q, plan in zip(QUESTIONS, plans, strict=True)]
    assert [answer.tokens for answer in together] == alone


def test_a_seed_makes_samples_repeatable(model: Model) -> None:
    prompts = [model.render(question) for question in QUESTIONS]
    plans = [model.plan(None)] * 5

    def sampled(seed: int) -> list[list[int]]:
        sampling = Sampling(max_tokens=10, temp=1.5, top_p=0.95, seed=seed)
        return [answer.tokens for answer in generate_batch(model, prompts, plans, sampling)]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_more_rows_than_a_batch_holds_are_decoded_in_parts(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_tokens=8)
    plans, prompts = _plans(model), [model.render(question) for question in QUESTIONS]
    whole = generate_batch(model, prompts, plans, sampling)
    monkeypatch.setattr("mlxsteer.generation.MAX_BATCH_ROWS", 2)
    assert generate_batch(model, prompts, plans, sampling) == whole


def test_models_whose_caches_hold_one_row_answer_one_by_one(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_tokens=8)
    plans, prompts = _plans(model), [model.render(question) for question in QUESTIONS]
    whole = generate_batch(model, prompts, plans, sampling)
    monkeypatch.setattr("mlxsteer.batch.can_batch", lambda *_: False)
    assert generate_batch(model, prompts, plans, sampling) == whole


def test_no_rows_give_no_answers(model: Model) -> None:
    assert generate_batch(model, [], [], Sampling()) == []


def test_hybrid_rows_answer_as_they_do_alone(tmp_path: Path) -> None:
    hybrid = mlxsteer.load(str(chat_folder(tmp_path / "hybrid", "qwen3_next")))
    sampling, plans = Sampling(max_tokens=10), _plans(hybrid)
    together = generate_batch(hybrid, [hybrid.render(q) for q in QUESTIONS], plans, sampling)
    alone = [_alone(hybrid, q, plan, sampling) for q, plan in zip(QUESTIONS, plans, strict=True)]
    assert [answer.tokens for answer in together] == alone
