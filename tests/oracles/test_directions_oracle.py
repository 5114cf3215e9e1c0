"""The directions against other ways to the same answer, written out in float64.

Power iteration for the principal direction, the gradient of the documented loss for the probe,
an explicit D×D inverse for whitening, a loop over pairs for the AUROC.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsteer import directions

SEEDS = range(4)


def poles(seed: int, n: int = 12, d: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, d)) + 3 * rng.normal(size=d)
    positive = common + rng.normal(size=d) + 0.7 * rng.normal(size=(n, d))
    return positive.astype(np.float32), common.astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("seed", SEEDS)
def test_principal_is_the_top_eigenvector_by_power_iteration(seed):
    positive, negative = poles(seed)
    differences = (positive - negative).astype(np.float64)
    scatter = differences.T @ differences
    vector = np.ones(scatter.shape[0])
    for _ in range(2000):
        vector = scatter @ vector
        vector /= np.linalg.norm(vector)
    found = directions.principal(positive, negative)
    assert abs(cosine(found, vector)) == pytest.approx(1.0, abs=1e-5)
    assert cosine(found, differences.mean(axis=0)) > 0


def documented_loss(w: np.ndarray, x: np.ndarray, y: np.ndarray, ridge: float) -> float:
    return float(np.logaddexp(0, -y * (x @ w)).sum() + ridge / 2 * w @ w)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ridge", [0.05, 1.0, 20.0])
@pytest.mark.parametrize(("n", "d"), [(12, 40), (60, 5), (1, 8)])
def test_the_probe_stands_where_the_documented_loss_is_flat(seed, ridge, n, d):
    positive, negative = poles(seed, n, d)
    x = np.concatenate([positive, negative]).astype(np.float64)
    x -= x.mean(axis=0)
    x /= np.linalg.norm(x, axis=1).mean()
    y = np.repeat([1.0, -1.0], n)
    unit = directions.logistic(positive, negative, ridge=ridge).astype(np.float64)
    unit /= np.linalg.norm(unit)
    # The returned length is the mean difference's, so the optimum is sought along the direction.
    lengths = np.geomspace(1e-3, 1e3, 20001)
    losses = [documented_loss(length * unit, x, y, ridge) for length in lengths[::100]]
    low, high = np.clip([np.argmin(losses) - 1, np.argmin(losses) + 1], 0, len(losses) - 1)
    fine = np.linspace(lengths[::100][low], lengths[::100][high], 2001)
    best = fine[np.argmin([documented_loss(length * unit, x, y, ridge) for length in fine])] * unit
    gradient = -(y / (1 + np.exp(y * (x @ best)))) @ x + ridge * best
    assert np.linalg.norm(gradient) < 2e-3 * ridge * np.linalg.norm(best) + 1e-6
    worse = [documented_loss(best + step, x, y, ridge) for step in 0.1 * np.eye(d)]
    assert min(worse) >= documented_loss(best, x, y, ridge)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shrinkage", [0.1, 0.5, 1.0])
def test_whitened_is_the_explicit_inverse_of_the_shrunk_covariance(seed, shrinkage):
    positive, negative = (pole.astype(np.float64) for pole in poles(seed, n=8, d=30))
    centred = np.concatenate([positive - positive.mean(0), negative - negative.mean(0)])
    covariance = centred.T @ centred / len(centred)
    sphere = np.trace(covariance) / 30 * np.eye(30)
    shrunk = (1 - shrinkage) * covariance + shrinkage * sphere
    difference = (positive - negative).mean(0)
    expected = np.linalg.inv(shrunk) @ difference
    expected *= np.linalg.norm(difference) / np.linalg.norm(expected)
    found = directions.whitened(positive.astype(np.float32), negative.astype(np.float32), shrinkage)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(up=SCORES, down=SCORES)
def test_auroc_is_the_share_of_cross_pairs_that_are_won(up, down):
    won = sum((a > b) + 0.5 * (a == b) for a in up for b in down)
    expected = won / (len(up) * len(down))
    assert directions.auroc(np.array(up), np.array(down)) == pytest.approx(expected)
