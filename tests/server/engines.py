"""What tests of the engine share: jobs, answers alone, and an engine that stands still."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlxsteer.generation import Sampling, stream
from mlxsteer.model import Model
from mlxsteer.plan import Plan
from mlxsteer.server.engine import Engine, Event, Generation, Job
from tests.chat_models import random_directions

QUESTIONS = ("w1 w2", "w3 w4 w5 w6 w7 w8 w9", "w10", "w11 w12 w13", "w14 w15 w16 w17 w18")
GREEDY = Sampling(max_tokens=16)


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


def await_tokens(generation: Generation, count: int) -> None:
    """Wait until an answer has `count` tokens, or is done."""
    for event in generation.events():
        if generation.tokens >= count or event.finish_reason:
            return


@contextmanager
def standing(engine: Engine) -> Iterator[None]:
    """The engine stands still inside the block."""
    reached, release = threading.Event(), threading.Event()
    engine.run_between(lambda: (reached.set(), release.wait(60)))
    assert reached.wait(60)
    yield
    release.set()


def submit_held(engine: Engine, job: Job, tokens: int) -> tuple[Generation, threading.Event]:
    """(an answer that has `tokens` so far, what lets the engine go on)."""
    asked: list[Generation] = []
    reached, release = threading.Event(), threading.Event()

    def hold() -> Iterator[None]:
        while not asked or asked[0].tokens < tokens:
            yield
        reached.set()
        release.wait(60)

    engine.run_between(hold)
    asked.append(engine.submit(job))
    assert reached.wait(60)
    return asked[0], release


def answers_of(generations: Sequence[Generation]) -> list[list[int]]:
    return [tokens_of(list(generation.events())) for generation in generations]
