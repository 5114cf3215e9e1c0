"""The engine: many answers at once, each as if it were alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxsteer.generation import Sampling, stream
from mlxsteer.model import Model
from mlxsteer.plan import Plan
from mlxsteer.server.engine import Engine, Event, Generation, Job
from mlxsteer.server.prefix import PrefixCache
from tests.chat_models import random_directions

QUESTIONS = ("w1 w2", "w3 w4 w5 w6 w7 w8 w9", "w10", "w11 w12 w13", "w14 w15 w16 w17 w18")
GREEDY = Sampling(max_tokens=24)


@pytest.fixture
def engine(tiny: Model) -> Iterator[Engine]:
    running = Engine(tiny, max_running=8, max_queued=8)
    running.start()
    yield running
    running.close(0)


def plans_of(model: Model) -> list[Plan]:
    first, second = random_directions(0), random_directions(1, name="pull")
    steers = (None, (first, "1r"), (second, "-2r@all"), (first, "1r@prompt"), [(first, "2r")])
    return [model.plan(steer) for steer in steers]


def job(model: Model, question: str, plan: Plan | None = None, **options: Any) -> Job:
    options.setdefault("sampling", GREEDY)
    return Job(tuple(model.render(question)), plan or model.plan(None), **options)


def alone(model: Model, question: str, plan: Plan, sampling: Sampling) -> list[int]:
    pieces = stream(model, model.render(question), plan, sampling)
    return [piece.token for piece in pieces if piece.finish_reason is None]


def tokens_of(events: Sequence[Event]) -> list[int]:
    return [event.token for event in events if event.token >= 0]


def answers_of(generations: Sequence[Generation]) -> list[list[int]]:
    return [tokens_of(list(generation.events())) for generation in generations]


def test_differently_steered_answers_decoded_together_equal_their_single_runs(
    engine: Engine, tiny: Model
) -> None:
    plans = plans_of(tiny)
    jobs = [job(tiny, q, plan) for q, plan in zip(QUESTIONS, plans, strict=True)]
    together = answers_of([engine.submit(each) for each in jobs])
    assert together == [alone(tiny, q, p, GREEDY) for q, p in zip(QUESTIONS, plans, strict=True)]
    assert len({tuple(tokens) for tokens in together}) == len(together)
