"""Many steerings side by side give what each gives alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mlxsteer
from mlxsteer import trials
from mlxsteer.contrast import Metric
from mlxsteer.model import Model
from mlxsteer.plan import Plan
from mlxsteer.trials import Arm
from tests.chat_models import chat_folder, random_directions
from tests.test_measure import alone

QUESTIONS = ["w1 w2 w3", "w4", "w5 w6"]
WORDS = Metric("words", direction="down")
MAX_TOKENS = 9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return mlxsteer.load(str(chat_folder(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.fixture(scope="module")
def arms(tiny: Model) -> list[Arm]:
    push = random_directions()
    steerings = [(0.0, Plan([]))]
    steerings += [(amount, tiny.plan([(push, f"{amount}r@all")])) for amount in (1.0, -1.0)]
    return trials.run(tiny, QUESTIONS, steerings, WORDS, max_tokens=MAX_TOKENS, show_progress=False)


def test_each_arm_is_what_its_steering_answers_alone(tiny, arms):
    assert [arm.amount for arm in arms] == [0.0, 1.0, -1.0]
    for arm in arms:
        steer = [(random_directions(), f"{arm.amount}r@all")] if arm.amount else None
        for question, answer in zip(QUESTIONS, arm.answers, strict=True):
            expected = tiny.generate(question, steer=steer, max_tokens=MAX_TOKENS)
            assert answer == expected.strip()
    assert len({arm.answers for arm in arms}) == 3  # the steerings did differ


def test_an_arms_numbers_are_those_of_its_answers(tiny, arms):
    for arm in arms:
        counts = [len(answer.replace("<", " ").replace(">", " ").split()) for answer in arm.answers]
        assert arm.per_answer == tuple(map(float, counts))
        assert arm.words == arm.metric == pytest.approx(np.mean(counts))
        losses = []
        for question, answer in zip(QUESTIONS, arm.answers, strict=True):
            tokens = tiny.tokenizer.encode(answer, add_special_tokens=False)
            losses.append(-alone(tiny, tiny.render(question), tokens).mean())
        assert arm.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)


def test_perplexity_is_the_unsteered_models(arms):
    plain, *steered = arms
    assert all(arm.perplexity > plain.perplexity for arm in steered)


def test_a_row_is_strict_json_even_where_nothing_was_said():
    silent = Arm(0.5, float("nan"), 0.0, 1.0, 0.0, float("inf"), ("",), (float("nan"),))
    row = silent.row()
    assert row["metric"] is None
    assert row["perplexity"] is None
    assert row["amount"] == 0.5
    json.dumps(row, allow_nan=False)
    assert "answers" not in row


def test_progress_goes_to_stderr(tiny, capsys, tmp_path: Path):
    steerings = [(0.0, Plan([]))]
    trials.run(tiny, QUESTIONS[:1], steerings, WORDS, max_tokens=1, show_progress=True)
    assert capsys.readouterr().out == ""
