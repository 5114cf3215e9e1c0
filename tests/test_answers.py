"""Answers are found again by all that decides them, and a damaged file loses one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mlxsteer
from mlxsteer import trials
from mlxsteer.answers import AnswerStore, Kept, key_of
from mlxsteer.contrast import Metric
from mlxsteer.errors import MlxsteerError
from mlxsteer.generation import Sampling
from mlxsteer.model import Model
from mlxsteer.plan import Plan
from mlxsteer.trials import Request
from tests.chat_models import chat_folder, random_directions

WORDS = Metric("words", direction="down")
ANSWER = Kept("k1", "two words", (4, 5), True, 1.5, {"question": "w1?", "amount": 3.0})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return mlxsteer.load(str(chat_folder(tmp_path_factory.mktemp("models") / "tiny")))


def test_what_was_kept_is_read_back(tmp_path: Path):
    silent = Kept("k2", "", (), True, float("nan"))
    unscored = Kept("k3", "x", (1,), False, None)
    AnswerStore(tmp_path / "a.jsonl").add([ANSWER, silent, unscored])
    read = AnswerStore(tmp_path / "a.jsonl")
    assert read.get("k1") == ANSWER
    assert read.get("k3") == unscored
    found = read.get("k2")
    assert found is not None
    assert found.loss is not None
    assert np.isnan(found.loss)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["two words", "", "x"]
    assert "NaN" not in "".join(lines)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_an_answer_with_a_unicode_line_end_is_one_line(tmp_path: Path, mark: str):
    path = tmp_path / "answers.jsonl"
    AnswerStore(path).add([Kept("a", f"one{mark}two", (1,), True, 0.5)])
    kept = AnswerStore(path).get("a")
    assert kept is not None
    assert kept.text == f"one{mark}two"


def test_a_line_cut_by_a_crash_is_absent_and_the_next_one_is_whole(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    AnswerStore(path).add([ANSWER])
    with path.open("a") as file:
        file.write('{"key": "k9", "text": "cut')
    store = AnswerStore(path)
    assert len(store) == 1
    store.add([Kept("k4", "later", (1,), True, 0.5)])
    assert AnswerStore(path).get("k4") is not None
    assert AnswerStore(path).get("k1") == ANSWER


def test_a_file_of_something_else_is_not_added_to(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text("buy milk\n")
    with pytest.raises(MlxsteerError, match="holds no answers of a sweep"):
        AnswerStore(path)


def test_the_key_holds_all_that_decides_an_answer(tiny):
    push = random_directions()
    plan = tiny.plan([(push, "1r@all")])
    sampling = Sampling(max_tokens=4)
    keys = {
        key_of(tiny, [1, 2], plan, sampling),
        key_of(tiny, [1, 3], plan, sampling),
        key_of(tiny, [1, 2], tiny.plan([(push, "2r@all")]), sampling),
        key_of(tiny, [1, 2], tiny.plan([(push, "1r@prompt")]), sampling),
        key_of(tiny, [1, 2], plan, Sampling(max_tokens=5)),
        key_of(tiny, [1, 2], plan, Sampling(max_tokens=4, temp=1.0)),
    }
    assert len(keys) == 6
    assert key_of(tiny, (1, 2), tiny.plan([(push, "1r@all")]), Sampling(max_tokens=4)) in keys


def test_only_what_is_missing_is_written_again(tiny, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    requests = [Request(tiny.render(f"w{i}"), Plan([])) for i in range(4)]
    sampling = Sampling(max_tokens=5)
    options = {"show_progress": False}
    first = trials.answer(tiny, requests[:3], sampling, store=AnswerStore(path), **options)
    asked: list[int] = []
    real = trials.generate_batch

    def counting(model, prompts, *rest, **more):
        asked.append(len(prompts))
        return real(model, prompts, *rest, **more)

    monkeypatch.setattr(trials, "generate_batch", counting)
    again = trials.answer(tiny, requests, sampling, store=AnswerStore(path), **options)
    assert asked == [1]
    assert [kept.text for kept in again[:3]] == [kept.text for kept in first]
    fresh = trials.answer(tiny, requests, sampling, **options)
    assert [kept.tokens for kept in fresh] == [kept.tokens for kept in again]


def test_an_answer_kept_without_its_loss_is_scored_when_that_is_asked(tiny, tmp_path):
    store = AnswerStore(tmp_path / "a.jsonl")
    requests = [Request(tiny.render("w1"), Plan([]))]
    sampling = Sampling(max_tokens=5)
    options = {"show_progress": False, "store": store}
    [bare] = trials.answer(tiny, requests, sampling, scored=False, **options)
    assert bare.loss is None
    [scored] = trials.answer(tiny, requests, sampling, **options)
    assert scored.loss is not None
    assert scored.tokens == bare.tokens


def test_sampling_with_a_seed_is_repeatable(tiny):
    requests = [Request(tiny.render(f"w{i}"), Plan([])) for i in range(3)]
    sampling = Sampling(max_tokens=6, temp=1.0, seed=4)
    one, two = (trials.answer(tiny, requests, sampling, show_progress=False) for _ in range(2))
    other = trials.answer(
        tiny, requests, Sampling(max_tokens=6, temp=1.0, seed=5), show_progress=False
    )
    assert [kept.tokens for kept in one] == [kept.tokens for kept in two]
    assert [kept.tokens for kept in one] != [kept.tokens for kept in other]


def test_a_place_that_cannot_be_read_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MlxsteerError, match=r"Cannot read .*Not a directory"):
        AnswerStore(tmp_path / "file" / "a.jsonl")
