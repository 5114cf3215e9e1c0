"""Readings of the unsteered model, in any batch what they are alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxsteer
from mlxsteer import measure
from mlxsteer.files import cache_dir
from mlxsteer.measure import log_likelihoods, perplexity
from mlxsteer.model import Model
from tests.chat_models import chat_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSTEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny(tmp_path: Path) -> Model:
    return mlxsteer.load(str(chat_folder(tmp_path / "tiny")))


def alone(model: Model, prompt: list[int], answer: list[int]) -> np.ndarray:
    """log p of an answer's tokens, from one forward pass over that sequence only."""
    logits = np.array(model.logits([*prompt, *answer]), np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.array([log_p[len(prompt) - 1 + i, token] for i, token in enumerate(answer)])


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 100])
def test_log_likelihoods_in_any_batch_are_those_of_each_sequence_alone(
    tiny, monkeypatch, rows_at_a_time
):
    monkeypatch.setattr(measure, "MAX_SCORED_ELEMENTS", rows_at_a_time * 16 * 64)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, n).tolist() for n in (1, 4, 9, 3, 12)]
    answers = [rng.integers(0, 64, n).tolist() for n in (3, 1, 7, 0, 4)]
    found = log_likelihoods(tiny, prompts, answers)
    for prompt, answer, scores in zip(prompts, answers, found, strict=True):
        assert scores.shape == (len(answer),)
        if answer:
            np.testing.assert_allclose(scores, alone(tiny, prompt, answer), atol=1e-4)


def test_log_likelihoods_hold_no_more_logits_at_a_time_than_allowed(tiny, monkeypatch):
    monkeypatch.setattr(measure, "MAX_SCORED_ELEMENTS", 3 * 8 * 64)
    shapes = []
    original = measure._score

    def score(model: Any, batch: list[int], *rest: Any) -> Any:
        shapes.append(len(batch))
        return original(model, batch, *rest)

    monkeypatch.setattr(measure, "_score", score)
    log_likelihoods(tiny, [[1, 2, 3, 4]] * 7, [[5, 6, 7, 8]] * 7)
    assert shapes == [3, 3, 1]


def test_perplexity_of_a_fair_die_is_six():
    assert perplexity(np.log(np.full(10, 1 / 6))) == pytest.approx(6)
    assert np.isnan(perplexity(np.zeros(0)))


def test_residual_norm_is_the_median_without_first_positions(tiny):
    norms = []
    for prompt in measure.NORM_PROMPTS:
        states = np.array(tiny.capture(tiny.render(prompt))["residual"])
        norms.append(np.linalg.norm(states[:, 1:], axis=-1))
    expected = np.median(np.concatenate(norms, axis=1), axis=1)
    np.testing.assert_allclose(tiny.residual_norm, expected, rtol=1e-5)


def test_a_sink_at_the_first_position_does_not_move_the_norms(tiny):
    expected = measure._measure(tiny)
    network: Any = tiny.network
    [first] = {tiny.render(prompt)[0] for prompt in measure.NORM_PROMPTS}
    # Blocks that add nothing: what a first token's embedding holds stays at its position.
    for block in network.layers:
        block.self_attn.o_proj.weight *= 0
        block.mlp.down_proj.weight *= 0
    still = measure._measure(tiny)
    embedding = network.model.embed_tokens.weight
    grown = mx.where((mx.arange(64) == first)[:, None], 1e4 * embedding, embedding)
    network.model.embed_tokens.weight = grown
    np.testing.assert_allclose(measure._measure(tiny), still, rtol=1e-5)
    assert not np.allclose(still, expected)


def test_norms_are_measured_once_per_model_and_again_when_the_file_is_damaged(
    tiny, tmp_path, monkeypatch
):
    first = tiny.residual_norm
    [path] = (cache_dir() / "norms").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_measure", None)
        assert (measure.residual_norm(tiny) == first).all()
    for damage in ("{", "[]", '{"residual_norm": "x"}', json.dumps({"residual_norm": [1.0]})):
        path.write_text(damage)
        np.testing.assert_allclose(measure.residual_norm(tiny), first)
    other = mlxsteer.load(str(chat_folder(tmp_path / "other", seed=1)))
    assert not np.allclose(other.residual_norm, first)


def test_a_cache_that_cannot_be_written_costs_time_only(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXSTEER_CACHE", str(tmp_path / "file" / "below"))
    assert measure.residual_norm(tiny).shape == (4,)
