"""Scores of dictionaries whose scores are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxsteer.model import Model
from mlxsteer.models import adapters
from mlxsteer.models.hooks import Run
from mlxsteer.sae import activations, score
from mlxsteer.sae.corpus import Window
from mlxsteer.sae.dictionary import Dictionary
from tests.sae import synthetic
from tests.v4 import tiny as v4

LAYER = 1


def identity(width: int, scale: float = 1.0) -> Dictionary:
    """scale·x = ReLU(scale·x) - ReLU(-scale·x): 2·width features, half of which fire."""
    eye = mx.eye(width)
    both = mx.concatenate([eye, -eye])
    zeros = mx.zeros((2 * width,))
    return Dictionary("standard", scale * both.T, both, mx.zeros((width,)), zeros)


@pytest.fixture
def found() -> list[Window]:
    rng = np.random.default_rng(0)
    return [Window(tuple(rng.integers(6, 64, 20).tolist()), start) for start in (1, 1, 4)]


def test_fit_of_a_perfect_dictionary(tmp_path: Path) -> None:
    data = synthetic.buffer(tmp_path / "states.bf16", rows=3000)
    fit, density = score.fit(identity(synthetic.WIDTH), data)
    assert fit.explained_variance == pytest.approx(1, abs=1e-6)
    assert fit.l0 == pytest.approx(synthetic.WIDTH, rel=0.01)
    assert (fit.held_out_rows, fit.density_rows) == (1000, 2000)
    np.testing.assert_allclose(density[: synthetic.WIDTH] + density[synthetic.WIDTH :], 1,
                               atol=0.01)  # fmt: skip


def test_fit_counts_silent_features_and_lost_variance(tmp_path: Path) -> None:
    data = synthetic.buffer(tmp_path / "states.bf16", rows=3000)
    mean = data.rows(data.held_out()).mean(axis=0)
    width = synthetic.WIDTH
    silent = Dictionary("standard", mx.zeros((width, 10)), mx.ones((10, width)), mean,
                        mx.array([-1.0] * 10))  # fmt: skip
    fit, _ = score.fit(silent, data)
    assert fit.dead == 1
    assert fit.l0 == 0
    assert fit.explained_variance == pytest.approx(0, abs=1e-5)


def test_splicing_in_the_states_themselves_costs_nothing(tiny: Model, found: list[Window]) -> None:
    mean = mx.zeros((tiny.d_model,))
    result = score.splice(tiny, identity(tiny.d_model), found, LAYER, "residual", mean)
    assert result.spliced == pytest.approx(result.clean, abs=1e-5)
    assert result.recovered == pytest.approx(1, abs=1e-3)
    assert result.zero == pytest.approx(result.mean, abs=1e-6)  # the mean given is zero
    assert abs(result.zero - result.clean) > 1e-3
    assert result.tokens == 18 + 18 + 15


def test_the_clean_loss_is_the_models_own(tiny: Model, found: list[Window]) -> None:
    mean = mx.zeros((tiny.d_model,))
    result = score.splice(tiny, identity(tiny.d_model), found[:1], LAYER, "residual", mean)
    tokens = mx.array([found[0].tokens])
    losses = nn.losses.cross_entropy(tiny.network(tokens)[0, 1:-1], tokens[0, 2:])
    assert result.clean == pytest.approx(float(losses.mean()), abs=1e-5)


def v4_model() -> Any:
    network = v4.model()
    return SimpleNamespace(network=network, hooks=adapters.install(network), d_model=64)


def test_on_deepseek_v4_the_mean_of_the_streams_is_read_and_replaced() -> None:
    model = v4_model()
    tokens = tuple(v4.token_ids()[0, :12].tolist())
    seen: list[mx.array] = []

    def keep(x: mx.array) -> mx.array:
        seen.append(x)
        return x

    with model.hooks.forward(Run(edits={(LAYER, "residual"): keep})):
        model.network(mx.array([tokens]))
    streams = np.array(seen[0])  # [1, T, 4, D]
    mean = streams[0].mean(axis=1)
    read = activations.read_batch(model, [Window(tokens, 2)], LAYER, "residual")
    np.testing.assert_allclose(read, mean[2:], atol=1e-5)
    edited = np.array(score._replacing(lambda x: 3 * x, start=2)(seen[0]))
    np.testing.assert_allclose(edited[0, 2:].mean(axis=1), 3 * mean[2:], atol=1e-4)
    spread = streams[0] - mean[:, None]
    np.testing.assert_allclose(edited[0] - edited[0].mean(axis=1)[:, None], spread, atol=1e-4)
    np.testing.assert_array_equal(edited[0, :2], streams[0, :2])
