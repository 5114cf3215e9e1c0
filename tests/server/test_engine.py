"""The engine: many answers at once, each as if it were alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxsteer
from mlxsteer.errors import MlxsteerError
from mlxsteer.generation import Sampling, stream
from mlxsteer.model import Model
from mlxsteer.probe import probe_of
from mlxsteer.server import decoding, floor, prefilling
from mlxsteer.server.engine import Engine, Event, Generation, Job
from mlxsteer.server.floor import Floor
from mlxsteer.server.prefilling import Prefill
from mlxsteer.server.prefix import PrefixCache
from tests.chat_models import chat_folder, random_directions
from tests.server.engines import (
    GREEDY,
    QUESTIONS,
    alone,
    answers_of,
    await_tokens,
    job,
    plans_of,
    standing,
    submit_held,
    tokens_of,
)


def test_differently_steered_answers_decoded_together_equal_their_single_runs(
    engine: Engine, tiny: Model
) -> None:
    plans = plans_of(tiny)
    jobs = [job(tiny, q, plan) for q, plan in zip(QUESTIONS, plans, strict=True)]
    together = answers_of([engine.submit(each) for each in jobs])
    assert together == [alone(tiny, q, p, GREEDY) for q, p in zip(QUESTIONS, plans, strict=True)]
    assert len({tuple(tokens) for tokens in together}) == len(together)


def test_rows_that_join_at_any_time_get_what_they_get_alone(tiny: Model) -> None:
    rng = random.Random(0)
    sampling = [
        GREEDY,
        Sampling(max_tokens=9, temp=1.2, seed=rng.randrange(99)),
        Sampling(max_tokens=30, temp=0.8, top_p=0.9, seed=5),
        Sampling(max_tokens=12, repetition_penalty=1.5),
        Sampling(max_tokens=20, temp=1.0, top_k=5, min_p=0.05, seed=6),
    ]
    plans = plans_of(tiny)
    asked = [(rng.choice(QUESTIONS), rng.choice(plans), rng.choice(sampling)) for _ in range(8)]
    engine = Engine(tiny, max_running=4, max_queued=20, prefix_cache=PrefixCache())
    engine.start()
    going: list[Generation] = []
    for question, plan, how in asked:
        going.append(engine.submit(job(tiny, question, plan, sampling=how)))
        await_tokens(rng.choice(going), rng.randrange(9))
    together = answers_of(going)
    engine.close()
    assert together == [alone(tiny, *each) for each in asked]


def test_text_phases_and_finish_reasons_are_those_of_a_single_run(
    engine: Engine, tiny: Model
) -> None:
    tokens = tiny.render("w1 w2", thinking=True)
    events = list(engine.submit(Job(tuple(tokens), tiny.plan(None), GREEDY)).events())
    pieces = list(stream(tiny, tokens, tiny.plan(None), GREEDY))
    assert [(e.text, e.phase) for e in events] == [(p.text, p.phase) for p in pieces]
    assert events[-1].finish_reason == pieces[-1].finish_reason
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].token == -1


def test_a_moved_slider_acts_on_exactly_the_token_it_names(engine: Engine, tiny: Model) -> None:
    plain, pushed = tiny.plan(None), tiny.plan((random_directions(0), "2r"))
    asked = job(tiny, "w1 w2", plain, sampling=Sampling(max_tokens=20))
    generation, release = submit_held(engine, asked, 5)
    first = generation.steer(pushed)
    release.set()
    seen = list(generation.events())
    assert first == 5
    steers = [event.steer for event in seen if event.token >= 0]
    assert steers == [""] * first + [str(pushed)] * (len(steers) - first)
    # The same by hand: tokens up to `first` under one plan, the rest under the other.
    cache, tokens = tiny.make_cache(), tiny.render("w1 w2")
    length, wanted = len(tokens), []
    for index in range(len(steers)):
        plan = plain if index < first else pushed
        logits = tiny.logits(tokens, plan, cache, prompt_length=length)
        tokens = [int(logits[-1].argmax().item())]
        wanted += tokens
    assert tokens_of(seen) == wanted


def test_steering_set_before_the_first_token_acts_on_all(tiny: Model) -> None:
    engine = Engine(tiny)
    generation = Generation(job(tiny, "w1 w2"))
    pushed = tiny.plan((random_directions(0), "2r"))
    assert generation.steer(pushed) == 0
    engine._queue.append(generation)
    engine.start()
    assert tokens_of(list(generation.events())) == alone(tiny, "w1 w2", pushed, GREEDY)
    engine.close()
    with pytest.raises(MlxsteerError, match="complete"):
        generation.steer(pushed)


def test_cancelling_frees_the_row_and_leaves_the_others(engine: Engine, tiny: Model) -> None:
    first, release = submit_held(engine, job(tiny, "w1 w2"), 2)
    second = engine.submit(job(tiny, "w10"))
    first.cancel()
    release.set()
    events = list(first.events())
    assert (len(events), events[-1].finish_reason) == (3, "cancelled")
    assert answers_of([second]) == [alone(tiny, "w10", tiny.plan(None), GREEDY)]
    assert engine.status().finished["cancelled"] == 1


@pytest.mark.parametrize("index", [2, 7])
def test_a_stop_text_across_tokens_is_cut_off(engine: Engine, tiny: Model, index: int) -> None:
    plain = [e.text for e in engine.submit(job(tiny, "w1 w2")).events()]
    whole = "".join(plain)
    middle = len("".join(plain[: index + 1]))
    stop = whole[middle - 2 : middle + 2]  # the end of one token and the beginning of the next
    events = list(engine.submit(job(tiny, "w1 w2", stop=("never", stop))).events())
    assert "".join(event.text for event in events) == whole[: whole.index(stop)]
    assert (events[-1].finish_reason, events[-1].stop_sequence) == ("stop", stop)


def test_text_that_only_begins_like_a_stop_text_is_kept(engine: Engine, tiny: Model) -> None:
    plain = "".join(event.text for event in engine.submit(job(tiny, "w1 w2")).events())
    held = job(tiny, "w1 w2", stop=(plain[5:15] + "!", plain[-3:] + "!"))
    events = list(engine.submit(held).events())
    assert "".join(event.text for event in events) == plain
    assert events[-1].finish_reason == "length"


def test_log_probabilities_are_those_of_the_logits(engine: Engine, tiny: Model) -> None:
    plan = tiny.plan((random_directions(0), "1r"))
    asked = job(tiny, "w1 w2", plan, logprobs=3, presence_penalty=1.0, logit_bias={7: 3.0})
    beside = engine.submit(job(tiny, "w10"))
    events = list(engine.submit(asked).events())[:-1]
    assert all(event.logprob is None for event in beside.events())
    tokens = tiny.render("w1 w2")
    whole = [*tokens, *tokens_of(events)]
    logits = np.array(tiny.logits(whole[:-1], plan, prompt_length=len(tokens)))
    scores = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[len(tokens) - 1 :]
    for event, row in zip(events, scores, strict=True):
        best = np.argsort(-row)[:3]
        assert event.logprob == pytest.approx(row[event.token], abs=1e-4)
        assert [token for token, _ in event.top] == best.tolist()
        assert [score for _, score in event.top] == pytest.approx(row[best].tolist(), abs=1e-4)


def test_bias_and_penalties_act_on_their_row_alone(engine: Engine, tiny: Model) -> None:
    plain = engine.submit(job(tiny, "w1 w2"))
    banned = alone(tiny, "w1 w2", tiny.plan(None), GREEDY)[0]
    biased = engine.submit(job(tiny, "w1 w2", logit_bias={banned: -100.0}))
    penalised = engine.submit(job(tiny, "w1 w2", presence_penalty=100.0))
    counted = engine.submit(job(tiny, "w1 w2", frequency_penalty=100.0))
    without, once, again = answers_of([biased, penalised, counted])
    assert answers_of([plain]) == [alone(tiny, "w1 w2", tiny.plan(None), GREEDY)]
    assert banned not in without
    assert len(set(once)) == len(once)
    assert once == again


def test_readings_are_those_of_a_captured_pass(engine: Engine, tiny: Model) -> None:
    vector = random_directions(3)
    probe = probe_of(vector, tiny.shape)
    plan = tiny.plan((random_directions(0), "1r"))
    engine.submit(job(tiny, "w3 w4"))
    events = list(engine.submit(job(tiny, "w1 w2", plan, probes=(probe,))).events())[:-1]
    tokens = tiny.render("w1 w2")
    whole = [*tokens, *tokens_of(events)]
    cache = tiny.steered.new_cache(tiny.row(plan, len(tokens)))
    place = (probe.layer, probe.site)
    _, captured = tiny.steered.read(mx.array([whole[:-1]]), cache, frozenset({place}))
    states = probe.read(captured[place][0, len(tokens) - 1 :])
    assert [event.readings[0] for event in events] == pytest.approx(states.tolist(), abs=1e-4)


def test_a_prompt_of_one_token_is_answered(engine: Engine, tiny: Model) -> None:
    plan = tiny.plan((random_directions(0), "1r"))
    beside = engine.submit(job(tiny, "w1 w2"))
    events = list(engine.submit(Job((5,), plan, GREEDY)).events())
    pieces = stream(tiny, [5], plan, GREEDY)
    wanted = [piece.token for piece in pieces if piece.token >= 0]
    assert tokens_of(events) == wanted[: GREEDY.max_tokens]
    assert len(answers_of([beside])[0]) == GREEDY.max_tokens


def test_an_event_loop_can_follow_an_answer(engine: Engine, tiny: Model) -> None:
    async def follow() -> list[Event]:
        return [event async for event in engine.submit(job(tiny, "w1 w2"))]

    events = asyncio.run(follow())
    assert tokens_of(events) == alone(tiny, "w1 w2", tiny.plan(None), GREEDY)


def test_a_long_prompt_does_not_stall_its_neighbours(
    engine: Engine, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices: list[int] = []
    advance = Prefill.advance

    def counted(prefill: Prefill, limit: int) -> int:
        if prefill.row.generation is long:
            slices.append(beside.tokens)
        return advance(prefill, limit)

    monkeypatch.setattr(Floor, "_slice", lambda self: 16)
    monkeypatch.setattr(Prefill, "advance", counted)
    with standing(engine):
        beside = engine.submit(job(tiny, "w1 w2", sampling=Sampling(max_tokens=100)))
        long = engine.submit(Job(tuple(tiny.render("w3 " * 150)), tiny.plan(None), GREEDY))
    list(long.events())
    assert len(slices) >= 150 // 16
    assert slices[2:] == list(range(slices[2], slices[2] + len(slices) - 2))  # a token per slice
    assert long.prefilled >= 150
    assert answers_of([long]) == [alone(tiny, "w3 " * 150, tiny.plan(None), GREEDY)]


def test_prompts_that_wait_together_are_run_together(
    engine: Engine, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []

    def counted(prefills: Sequence[Prefill]) -> int:
        groups.append(len(prefills))
        return prefilling.advance_together(prefills)

    monkeypatch.setattr(floor, "advance_together", counted)
    plans = plans_of(tiny)
    asked = [*zip(QUESTIONS, plans, strict=True), ("w3 " * 100, plans[0])]
    with standing(engine):
        going = [engine.submit(job(tiny, q, p)) for q, p in asked]
    assert answers_of(going) == [alone(tiny, q, p, GREEDY) for q, p in asked]
    assert groups[0] == len(QUESTIONS)  # and the long one apart
    assert sum(groups) == len(QUESTIONS)


def test_prompts_go_on_together_from_what_is_kept_of_each(tiny: Model) -> None:
    engine = Engine(tiny, max_running=8, prefix_cache=PrefixCache())
    engine.start()
    first = [engine.submit(job(tiny, q)) for q in QUESTIONS]
    assert all(answers_of(first))
    longer = [f"{q} w20 w21 w22" for q in QUESTIONS]
    plans = plans_of(tiny)
    with standing(engine):
        going = [engine.submit(job(tiny, q, p)) for q, p in zip(longer, plans, strict=True)]
    wanted = [alone(tiny, q, p, GREEDY) for q, p in zip(longer, plans, strict=True)]
    assert answers_of(going) == wanted
    assert sum(generation.cached_tokens > 0 for generation in going) >= 3
    engine.close()


def test_rows_of_very_different_length_decode_apart_and_right(
    engine: Engine, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor, "SHORT", 16)
    questions = ["w1 w2", "w3 " * 100, "w4", "w5 " * 90]
    going = [engine.submit(job(tiny, q)) for q in questions]
    assert answers_of(going) == [alone(tiny, q, tiny.plan(None), GREEDY) for q in questions]


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "mamba2"])
def test_other_kinds_of_caches_share_steps_too(tmp_path: Path, family: str) -> None:
    model = mlxsteer.load(str(chat_folder(tmp_path / family, family)))
    engine = Engine(model, prefix_cache=PrefixCache())
    engine.start()
    sampling = Sampling(max_tokens=12)
    wanted = [alone(model, q, model.plan(None), sampling) for q in QUESTIONS]
    for _ in range(2):
        going = [engine.submit(job(model, q, sampling=sampling)) for q in QUESTIONS]
        assert answers_of(going) == wanted
    engine.close()


def test_a_model_whose_caches_cannot_be_joined_answers_one_at_a_time(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (floor, decoding):
        monkeypatch.setattr(module, "can_batch", lambda steered, row: False)
    engine = Engine(tiny, prefix_cache=PrefixCache())
    engine.start()
    plans = plans_of(tiny)
    going = [engine.submit(job(tiny, q, p)) for q, p in zip(QUESTIONS, plans, strict=True)]
    wanted = [alone(tiny, q, p, GREEDY) for q, p in zip(QUESTIONS, plans, strict=True)]
    assert answers_of(going) == wanted
    engine.close()


@pytest.mark.slow
def test_32_steered_answers_of_the_demo_model_equal_their_single_runs() -> None:
    model = mlxsteer.load("demo")
    steers = (None, "terse:3", "formal:3@all", "cheerful:2", "terse:2, cheerful:-1")
    asked = [
        (f"Name {number + 2} things you can do with a rope.", model.plan(steers[number % 5]))
        for number in range(32)
    ]
    # top_k keeps the places few at which a draw is decided by rounding: its logits differ by 1e-5.
    ways = (GREEDY, Sampling(max_tokens=24, temp=0.8, top_k=20, seed=3))
    engine = Engine(model, max_running=32, prefix_cache=PrefixCache())
    engine.start()
    going = [
        engine.submit(job(model, question, plan, sampling=ways[number % 2]))
        for number, (question, plan) in enumerate(asked)
    ]
    together = answers_of(going)
    engine.close()
    assert together == [
        alone(model, question, plan, ways[number % 2])
        for number, (question, plan) in enumerate(asked)
    ]
