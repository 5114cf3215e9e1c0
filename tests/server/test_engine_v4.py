"""The engine on a tiny DeepSeek-V4, whose caches cannot be rewound."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

import mlxsteer
from mlxsteer.generation import Sampling, stream
from mlxsteer.model import Model
from mlxsteer.plan import Plan
from mlxsteer.server.disk import DiskTier
from mlxsteer.server.engine import Engine, Generation, Job
from mlxsteer.server.prefix import PrefixCache
from tests.chat_models import WORDS, random_directions, write_tokenizer
from tests.server.engines import await_tokens
from tests.v4.tiny import FIXTURES

SAMPLING = Sampling(max_tokens=10)


@pytest.fixture(scope="module")
def v4(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("models") / "v4"
    shutil.copytree(FIXTURES / "tiny_fp32", folder)
    write_tokenizer(folder, WORDS)
    return mlxsteer.load(str(folder), dtype="float32", activation_rounding=False)


def alone(model: Model, tokens: list[int], plan: Plan, sampling: Sampling) -> list[int]:
    pieces = stream(model, tokens, plan, sampling)
    return [piece.token for piece in pieces if piece.finish_reason is None]


def answer(engine: Engine, tokens: list[int], plan: Plan) -> tuple[list[int], int]:
    generation = engine.submit(Job(tuple(tokens), plan, SAMPLING))
    written = [event.token for event in generation.events() if event.token >= 0]
    return written, generation.cached_tokens


def test_rows_that_join_at_any_time_get_what_they_get_alone(v4: Model) -> None:
    rng = random.Random(3)
    vectors = [random_directions(seed, n_layers=v4.n_layers) for seed in (0, 1)]
    plans = [v4.plan(s) for s in (None, (vectors[0], "1r"), (vectors[1], "-1r@all"))]
    how = [SAMPLING, Sampling(max_tokens=8, temp=1.0, seed=8)]
    asked = [
        ([rng.randrange(6, 64) for _ in range(rng.randrange(1, 30))], plan, rng.choice(how))
        for plan in plans * 2
    ]
    engine = Engine(v4, max_running=4)
    engine.start()
    going: list[Generation] = []
    for tokens, plan, sampling in asked:
        going.append(engine.submit(Job(tuple(tokens), plan, sampling)))
        await_tokens(rng.choice(going), rng.randrange(6))
    together = [[e.token for e in each.events() if e.token >= 0] for each in going]
    engine.close()
    assert together == [alone(v4, *each) for each in asked]


def test_the_third_prompt_goes_on_from_where_the_second_left_the_first(v4: Model) -> None:
    plain = v4.plan((random_directions(0, n_layers=v4.n_layers), "1r"))
    shared = list(range(10, 55))
    prompts = [[*shared, last, 5] for last in (60, 61, 62)]
    engine = Engine(v4, prefix_cache=PrefixCache())
    engine.start()
    found = [answer(engine, prompt, plain) for prompt in prompts]
    again = answer(engine, prompts[0], plain)
    engine.close()
    assert [cached for _, cached in found] == [0, 0, len(shared)]
    assert [tokens for tokens, _ in found] == [alone(v4, p, plain, SAMPLING) for p in prompts]
    assert again == (found[0][0], len(prompts[0]) - 1)


def test_a_state_comes_back_from_disk_as_it_was(v4: Model, tmp_path: Path) -> None:
    plan, prompt = v4.plan(None), list(range(10, 60))
    first, following = prompt, [*prompt, 7, 8, 9]
    for asked, wanted in ((first, 0), (following, len(prompt) - 1)):
        disk = DiskTier(v4, tmp_path, min_tokens=16)
        engine = Engine(v4, prefix_cache=PrefixCache(disk=disk))
        engine.start()
        tokens, cached = answer(engine, asked, plan)
        engine.close()
        assert (tokens, cached) == (alone(v4, asked, plan, SAMPLING), wanted)
