"""The engine at its limits: a full queue, rows that fail, closing, work between steps."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from mlxsteer.errors import ContextLengthError, UsageError
from mlxsteer.generation import Sampling, generate_batch
from mlxsteer.model import Model
from mlxsteer.plan import PROMPT, Plan, SiteEdit
from mlxsteer.progress import progress, reporting
from mlxsteer.server.engine import Busy, Closing, Engine, Job
from mlxsteer.server.prefix import PrefixCache
from tests.chat_models import random_directions
from tests.server.engines import (
    GREEDY,
    QUESTIONS,
    alone,
    answers_of,
    job,
    plans_of,
    standing,
    submit_held,
    tokens_of,
)


def test_a_full_queue_says_when_to_come_back(tiny: Model) -> None:
    engine = Engine(tiny, max_running=1, max_queued=2)
    engine.start()
    with standing(engine):
        going = [engine.submit(job(tiny, "w1 w2")) for _ in range(3)]
        with pytest.raises(Busy) as refused:
            engine.submit(job(tiny, "w1 w2"))
    assert 1 <= refused.value.retry_after <= 60
    assert all(tokens for tokens in answers_of(going))
    assert tokens_of(list(engine.submit(job(tiny, "w1 w2")).events()))
    engine.close()


def test_what_cannot_be_run_is_refused_at_once(engine: Engine, tiny: Model) -> None:
    plan = tiny.plan(None)
    with pytest.raises(UsageError, match="empty"):
        engine.submit(Job((), plan))
    with pytest.raises(UsageError, match="no token 64"):
        engine.submit(Job((1, 64), plan))
    with pytest.raises(UsageError, match="no token -1"):
        engine.submit(Job((1,), plan, logit_bias={-1: 2.0}))
    with pytest.raises(ContextLengthError):
        engine.submit(Job((1,) * 300, plan))


class Breaking(Sampling):
    """Sampling whose penalties raise at the third token."""

    def processors(self) -> list[Any]:
        calls: list[int] = []

        def process(tokens: Any, logits: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("broken rule")
            return logits

        return [process]


def test_a_row_whose_rules_fail_ends_alone(engine: Engine, tiny: Model) -> None:
    bad = engine.submit(job(tiny, "w1 w2", sampling=Breaking(max_tokens=20)))
    good = engine.submit(job(tiny, "w10"))
    events = list(bad.events())
    assert events[-1].finish_reason == "error"
    assert "broken rule" in (events[-1].error or "")
    assert len(tokens_of(events)) == 2
    assert answers_of([good]) == [alone(tiny, "w10", tiny.plan(None), GREEDY)]


class BrokenPlan(Plan):
    """A plan whose arrays do not fit the model: a forward pass with it fails."""

    def __init__(self, plan: Plan):
        super().__init__(plan.terms)
        self.key = "broken"  # the kept edits of a sound plan would do

    def edit(self, phase: int, *rest: Any) -> dict[Any, Any]:
        if phase & PROMPT:
            return {}
        return {(1, "residual"): SiteEdit(shift=np.ones(7, np.float32))}


def test_a_row_that_breaks_the_shared_step_ends_alone(engine: Engine, tiny: Model) -> None:
    plans = plans_of(tiny)[:3]
    sampling = Sampling(max_tokens=24, temp=0.9, seed=4)
    bad = engine.submit(job(tiny, "w1 w2", BrokenPlan(plans[1])))
    asked = list(zip(QUESTIONS, plans, strict=False))
    good = [engine.submit(job(tiny, q, p, sampling=sampling)) for q, p in asked]
    events = list(bad.events())
    assert (events[-1].finish_reason, len(tokens_of(events))) == ("error", 1)
    assert answers_of(good) == [alone(tiny, q, p, sampling) for q, p in asked]


class BrokenPrompt(BrokenPlan):
    """A plan with which a prompt cannot be run."""

    def __init__(self, plan: Plan):
        super().__init__(plan)
        self.key = "broken prompt"

    def edit(self, phase: int, *rest: Any) -> dict[Any, Any]:
        return super().edit(0, *rest)


@pytest.mark.parametrize("kept", [None, PrefixCache()])
def test_a_prompt_that_fails_beside_others_fails_alone(
    tiny: Model, kept: PrefixCache | None
) -> None:
    plans = plans_of(tiny)
    engine = Engine(tiny, prefix_cache=kept)
    engine.start()
    with standing(engine):
        asked = list(zip(QUESTIONS, plans, strict=True))
        good = [engine.submit(job(tiny, q, p)) for q, p in asked[:2]]
        bad = engine.submit(job(tiny, "w1 w2 w3", BrokenPrompt(plans[1])))
        good += [engine.submit(job(tiny, q, p)) for q, p in asked[2:]]
    (end,) = bad.events()
    assert (end.finish_reason, "could not be processed" in (end.error or "")) == ("error", True)
    assert answers_of(good) == [alone(tiny, q, p, GREEDY) for q, p in asked]
    engine.close()


def test_a_live_change_survives_a_failed_step(engine: Engine, tiny: Model) -> None:
    plain, pushed = tiny.plan(None), tiny.plan((random_directions(0), "2r"))
    calm, release = submit_held(
        engine, job(tiny, "w1 w2", plain, sampling=Sampling(max_tokens=20)), 4
    )
    first = calm.steer(pushed)
    engine.submit(job(tiny, "w10", BrokenPlan(pushed)))
    release.set()
    seen = list(calm.events())
    quiet = engine.submit(job(tiny, "w1 w2", plain, sampling=Sampling(max_tokens=first)))
    start = answers_of([quiet])[0]
    prompt = tiny.render("w1 w2")
    cache = tiny.make_cache()
    tiny.logits([*prompt, *start[:-1]], plain, cache, prompt_length=len(prompt))
    wanted, last = list(start), start[-1]
    while len(wanted) < 20:
        last = int(tiny.logits([last], pushed, cache, len(prompt))[-1].argmax().item())
        wanted.append(last)
    assert tokens_of(seen) == wanted


def test_closing_finishes_what_it_can_and_cancels_the_rest(tiny: Model) -> None:
    before = set(threading.enumerate())
    engine = Engine(tiny, max_running=2)
    engine.start()
    short = [engine.submit(job(tiny, q)) for q in QUESTIONS]
    engine.close(drain_seconds=60)
    assert [list(g.events())[-1].finish_reason for g in short] == ["length"] * len(short)
    assert not set(threading.enumerate()) - before
    with pytest.raises(Closing):
        engine.submit(job(tiny, "w1"))

    engine = Engine(tiny, max_running=1)
    engine.start()
    with standing(engine):
        left = [engine.submit(job(tiny, q)) for q in QUESTIONS]
        closer = threading.Thread(target=engine.close, args=(0.0,))
        closer.start()
        while not engine._closing:
            time.sleep(0.01)
    closer.join()
    assert [list(g.events())[-1].finish_reason for g in left][-1] == "cancelled"
    assert not set(threading.enumerate()) - before


def test_work_between_steps_lets_answers_go_on(engine: Engine, tiny: Model) -> None:
    seen: list[int] = []

    def sliced() -> Any:
        while len(seen) < 5:
            seen.append(generation.tokens)
            yield
        return threading.current_thread().name

    def breathing() -> list[int]:
        counts = []
        for _ in range(5):
            counts.append(generation.tokens)
            engine.breathe()
        return counts

    with standing(engine):
        generation = engine.submit(job(tiny, "w1 w2", sampling=Sampling(max_tokens=30)))
        name, counts = engine.run_between(sliced), engine.run_between(breathing)
    assert name.result(60) == "mlxsteer-engine"
    assert len(set(seen)) == len(set(counts.result(60))) == 5
    with pytest.raises(ZeroDivisionError):
        engine.run_between(lambda: 1 // 0).result(60)
    assert answers_of([generation]) == [
        alone(tiny, "w1 w2", tiny.plan(None), Sampling(max_tokens=30))
    ]


def test_answers_go_on_at_every_step_of_a_batch_in_the_background(
    engine: Engine, tiny: Model
) -> None:
    def work() -> list[int]:
        seen = []

        def listen(label: str, done: int, total: int) -> None:
            seen.append(generation.tokens)
            engine.breathe()

        with reporting(listen), progress("Answering", 2) as advance:
            prompts, plans = [tiny.render("w3"), tiny.render("w4")], [tiny.plan(None)] * 2
            generate_batch(tiny, prompts, plans, Sampling(max_tokens=8), on_tokens=advance)
        return seen

    with standing(engine):
        generation = engine.submit(job(tiny, "w1 w2", sampling=Sampling(max_tokens=30)))
        seen = engine.run_between(work)
    assert len(set(seen.result(60))) == 8
    assert answers_of([generation]) == [
        alone(tiny, "w1 w2", tiny.plan(None), Sampling(max_tokens=30))
    ]
