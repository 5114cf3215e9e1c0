"""Kept prompts: what is reused is what would have been computed, in memory and from disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlxsteer.generation import Sampling
from mlxsteer.model import Model
from mlxsteer.plan import Plan
from mlxsteer.server.disk import DiskTier
from mlxsteer.server.engine import Engine, Event, Job
from mlxsteer.server.prefix import PrefixCache, codes_of, common_length
from tests.chat_models import random_directions
from tests.server.engines import submit_held

SAMPLING = Sampling(max_tokens=6)
SYSTEM = list(range(6, 46))  # 40 tokens that several prompts begin with


@pytest.fixture
def engine(tiny: Model) -> Iterator[Engine]:
    running = Engine(tiny, prefix_cache=PrefixCache())
    running.start()
    yield running
    running.close(0)


def ask(engine: Engine, tokens: list[int], plan: Plan) -> tuple[list[Event], int]:
    """(the events with log-probabilities, how many prompt tokens were found)."""
    generation = engine.submit(Job(tuple(tokens), plan, SAMPLING, logprobs=2))
    return list(generation.events()), generation.cached_tokens


def cold(model: Model, tokens: list[int], plan: Plan) -> list[Event]:
    engine = Engine(model)
    engine.start()
    events, cached = ask(engine, tokens, plan)
    engine.close()
    assert cached == 0
    return events


def assert_same(found: list[Event], wanted: list[Event]) -> None:
    assert [event.token for event in found] == [event.token for event in wanted]
    ours, theirs = ([event.logprob for event in events[:-1]] for events in (found, wanted))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token >= 0]


def test_codes_agree_where_token_and_steering_agree() -> None:
    plain, steered = [(5, ""), (6, ""), (7, "")], [(5, ""), (6, "x"), (7, "")]
    assert common_length(codes_of(plain), codes_of(steered)) == 1
    assert common_length(codes_of(plain), codes_of(plain[:2])) == 2
    assert common_length(codes_of(steered), codes_of([*steered, (8, "y")])) == 3


def test_a_prompt_is_shared_by_all_strengths(engine: Engine, tiny: Model) -> None:
    tokens = [*SYSTEM, 50, 51]
    for steer in (None, "1r", "3r"):
        plan = tiny.plan((random_directions(0), steer) if steer else None)
        events, cached = ask(engine, tokens, plan)
        assert cached == (0 if steer is None else len(tokens) - 1)
        assert_same(events, cold(tiny, tokens, plan))


def test_a_steered_prompt_is_shared_only_with_its_like(engine: Engine, tiny: Model) -> None:
    tokens = [*SYSTEM, 50, 51]
    vector = random_directions(0)
    for steer, wanted in (("1r@all", 0), ("2r@all", 0), ("1r", 0), ("1r@all", 41), ("2r@all", 41)):
        plan = tiny.plan((vector, steer))
        events, cached = ask(engine, tokens, plan)
        assert cached == wanted
        assert_same(events, cold(tiny, tokens, plan))


def test_a_beginning_is_shared_as_far_as_it_goes(engine: Engine, tiny: Model) -> None:
    plan = tiny.plan((random_directions(0), "1r"))
    ask(engine, [*SYSTEM, 50, 51, 52], plan)
    events, cached = ask(engine, [*SYSTEM, 60, 61], plan)
    assert cached == len(SYSTEM)
    assert_same(events, cold(tiny, [*SYSTEM, 60, 61], plan))


def test_the_next_turn_reuses_an_unsteered_answer_and_no_steered_one(
    engine: Engine, tiny: Model
) -> None:
    plain, steered = tiny.plan(None), tiny.plan((random_directions(0), "1r"))
    for plan, first in ((plain, [50, *SYSTEM]), (steered, [51, *SYSTEM])):
        answer = tokens_of(ask(engine, first, plan)[0])
        following = [*first, *answer, 55, 56]
        events, cached = ask(engine, following, plan)
        computed = len(first) + len(answer) - 1  # the last token was never run
        assert cached == (computed if plan is plain else len(first) - 1)
        assert_same(events, cold(tiny, following, plan))


def test_moving_a_slider_leaves_no_state_that_a_still_one_would_take(
    engine: Engine, tiny: Model
) -> None:
    tokens, plain = [*SYSTEM, 50], tiny.plan(None)
    generation, release = submit_held(engine, Job(tuple(tokens), plain, Sampling(max_tokens=20)), 3)
    first = generation.steer(tiny.plan((random_directions(0), "2r")))
    release.set()
    seen = list(generation.events())
    following = [*tokens, *tokens_of(seen), 55]
    found, cached = ask(engine, following, plain)
    assert cached == len(tokens) - 1 + first
    assert_same(found, cold(tiny, following, plain))


def test_an_entry_is_not_written_to_by_those_who_go_on_from_it(engine: Engine, tiny: Model) -> None:
    plain, tokens = tiny.plan(None), [*SYSTEM, 50, 51]
    first = ask(engine, tokens, plain)[0]
    for last in (52, 53, 54):
        ask(engine, [*tokens[:-1], last], plain)
    assert_same(ask(engine, tokens, plain)[0], first)


def test_a_byte_limit_drops_the_least_recently_used(tiny: Model) -> None:
    engine = Engine(tiny, prefix_cache=PrefixCache())
    engine.start()
    plain = tiny.plan(None)
    ask(engine, [*SYSTEM, 50], plain)
    one = engine.run_between(engine.status).result(60).prefix_bytes  # after the answer was kept
    engine.close()

    engine = Engine(tiny, prefix_cache=PrefixCache(max_bytes=int(2.5 * one)))
    engine.start()
    prompts = [[number, *SYSTEM] for number in (50, 51, 52)]
    ask(engine, prompts[0], plain)
    ask(engine, prompts[1], plain)
    assert ask(engine, prompts[0], plain)[1] == len(SYSTEM)
    ask(engine, prompts[2], plain)
    assert ask(engine, prompts[0], plain)[1] == len(SYSTEM)
    assert ask(engine, prompts[1], plain)[1] == 0
    assert engine.status().prefix_bytes <= 2.5 * one
    engine.close()


# --- disk ----------------------------------------------------------------------------------------


def engine_on(model: Model, folder: Path, **options: int) -> Engine:
    options.setdefault("min_tokens", 16)
    engine = Engine(model, prefix_cache=PrefixCache(disk=DiskTier(model, folder, **options)))
    engine.start()
    return engine


def served(model: Model, folder: Path, *asked: tuple[list[int], Plan]) -> list[int]:
    """Prompt tokens found by each of several prompts, by a server that starts and stops."""
    engine = engine_on(model, folder)
    cached = []
    for tokens, plan in asked:
        events, count = ask(engine, tokens, plan)
        assert_same(events, cold(model, tokens, plan))
        cached.append(count)
    engine.close()
    return cached


def test_a_restart_goes_on_from_disk(tiny: Model, tmp_path: Path) -> None:
    plain, steered = tiny.plan(None), tiny.plan((random_directions(0), "1r@all"))
    tokens = [*SYSTEM, 50, 51]
    assert served(tiny, tmp_path, (tokens, plain), (tokens, steered)) == [0, 0]
    other = [*SYSTEM, 52, 53]
    assert served(tiny, tmp_path, (other, steered), (other, plain)) == [len(SYSTEM)] * 2


def test_a_short_prompt_is_not_written(tiny: Model, tmp_path: Path) -> None:
    served(tiny, tmp_path, (SYSTEM[:3], tiny.plan(None)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "facts", "gone", "maker"])
def test_a_damaged_entry_is_removed_with_a_warning(
    tiny: Model, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens, plain = [*SYSTEM, 50, 51], tiny.plan(None)
    served(tiny, tmp_path, (tokens, plain))
    for arrays in tmp_path.glob("*.safetensors"):
        whole, facts = bytearray(arrays.read_bytes()), arrays.with_suffix(".json")
        if damage == "flip":
            whole[-5] ^= 1
            arrays.write_bytes(whole)
        elif damage == "cut":
            arrays.write_bytes(whole[:-5])
        elif damage == "facts":
            facts.write_text(facts.read_text()[:-9])
        elif damage == "gone":
            arrays.unlink()
        else:
            facts.write_text(json.dumps({**json.loads(facts.read_text()), "maker": "another"}))
    with caplog.at_level(logging.WARNING, "mlxsteer.server"):
        assert served(tiny, tmp_path, (tokens, plain)) == [0]
    assert "removed" in caplog.text
    assert served(tiny, tmp_path, (tokens, plain)) == [len(tokens) - 1]


def test_what_a_killed_server_leaves_is_swept_away(tiny: Model, tmp_path: Path) -> None:
    tokens, plain = [*SYSTEM, 50, 51], tiny.plan(None)
    served(tiny, tmp_path, (tokens, plain))
    kept = {path.name for path in tmp_path.iterdir()}
    (tmp_path / ".0a.safetensors.x.partial.safetensors").write_bytes(b"half")
    (tmp_path / ".0a.json.x.partial.json").write_text('{"format": 1')
    (tmp_path / "0b.safetensors").write_bytes(b"no facts yet")
    assert served(tiny, tmp_path, (tokens, plain)) == [len(tokens) - 1]
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_the_disk_limit_removes_the_longest_unused(tiny: Model, tmp_path: Path) -> None:
    plain = tiny.plan(None)
    prompts = [[number, *SYSTEM] for number in (50, 51, 52)]
    served(tiny, tmp_path, (prompts[0], plain), (prompts[1], plain))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    served(tiny, tmp_path, (prompts[0], plain))
    engine = engine_on(tiny, tmp_path, max_bytes=size)
    ask(engine, prompts[2], plain)
    engine.close()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= size
    assert served(tiny, tmp_path, *((prompt, plain) for prompt in prompts)) == [40, 0, 40]


def test_a_disk_that_refuses_is_a_warning(
    tiny: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING, "mlxsteer.server"):
        served(tiny, blocked / "folder", ([*SYSTEM, 50], tiny.plan(None)))
    assert "could not be kept" in caplog.text
