"""Directions by closed form, and what is said of them on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from mlxsteer import directions
from mlxsteer.errors import VectorError

PLANTED = np.array([3.0, 0, 0, 0, 0, 0], np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def states(n: int = 20, d: int = 6, gap: float = 1.0, noise: float = 0.3, seed: int = 0):
    """(positive, negative) [N, D]: pairs around a common state, PLANTED · gap apart."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, d)) + 2.0
    shift = gap * PLANTED[:d]
    positive = common + shift / 2 + noise * rng.normal(size=(n, d))
    negative = common - shift / 2 + noise * rng.normal(size=(n, d))
    return positive.astype(np.float32), negative.astype(np.float32)


@pytest.mark.parametrize("method", sorted(directions.METHODS))
def test_every_method_finds_a_planted_direction_at_the_mean_differences_length(method):
    positive, negative = states(n=400)
    found = directions.fit(positive, negative, method)
    assert found @ unit(PLANTED) / np.linalg.norm(found) > 0.97
    length = np.linalg.norm((positive - negative).mean(axis=0))
    assert np.linalg.norm(found) == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("method", sorted(directions.METHODS))
def test_swapping_the_poles_turns_the_direction_around(method):
    positive, negative = states()
    forward = directions.fit(positive, negative, method)
    np.testing.assert_allclose(directions.fit(negative, positive, method), -forward, atol=1e-4)


@pytest.mark.parametrize("method", sorted(directions.METHODS))
def test_one_pair_gives_its_difference(method):
    positive, negative = states(n=1)
    found = directions.fit(positive, negative, method)
    np.testing.assert_allclose(found, (positive - negative)[0], atol=1e-5)


@pytest.mark.parametrize("method", sorted(directions.METHODS))
def test_poles_far_apart_leave_every_method_finite_and_are_separated(method):
    positive, negative = states(gap=50.0)
    found = directions.fit(positive, negative, method)
    assert np.isfinite(found).all()
    assert (positive @ found).min() > (negative @ found).max()


@pytest.mark.parametrize("method", sorted(directions.METHODS))
def test_more_dimensions_than_samples_are_no_trouble(method):
    rng = np.random.default_rng(3)
    positive, negative = rng.normal(size=(2, 5, 300)).astype(np.float32)
    found = directions.fit(positive, negative, method)
    assert np.isfinite(found).all()
    assert unit(found) @ unit((positive - negative).mean(axis=0)) > 0.5


@pytest.mark.parametrize("method", sorted(directions.METHODS))
def test_poles_that_are_the_same_are_refused_with_what_to_do(method):
    same = states()[0]
    found = directions.fit(same, same.copy(), method)
    with pytest.raises(VectorError, match=r"mine: the two poles give the same.*layer 4.*wordings"):
        directions.require_nonzero(found, same, "mine", 4)


def test_a_difference_of_rounding_alone_is_refused():
    positive, _ = states()
    found = directions.fit(positive, positive * np.float32(1 + 2e-7), "mean")
    assert found.any()
    with pytest.raises(VectorError, match="the same states"):
        directions.require_nonzero(found, positive, "mine", 0)


def test_states_that_are_not_finite_are_not_called_equal():
    broken = np.full((2, 3), np.nan, np.float32)
    with pytest.raises(VectorError, match="no finite states at layer 7"):
        directions.require_nonzero(broken[0], broken, "mine", 7)


@pytest.mark.parametrize("method", sorted(directions.METHODS))
def test_orthogonalised_directions_have_no_part_along_the_control_mean(method):
    positive, negative = states()
    positive = positive + 3  # every state points this way a little
    control = unit(negative.mean(axis=0))
    assert abs(unit(directions.fit(positive, negative, method)) @ control) > 0.1
    found = directions.fit(positive, negative, method, orthogonalise=True)
    assert abs(unit(found) @ control) < 1e-6


def test_pca_keeps_the_mean_that_centring_would_remove():
    rng = np.random.default_rng(0)
    negative = rng.normal(size=(30, 6)).astype(np.float32)
    sideways = np.zeros((30, 6), np.float32)
    sideways[:, 1] = rng.normal(size=30) * 0.5
    found = directions.principal(negative + PLANTED + sideways, negative)
    assert unit(found) @ unit(PLANTED) > 0.99


def test_whitening_turns_away_from_what_varies_anyway():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 500, 2)) * [10.0, 1.0]
    positive, negative = noise + np.array([[[1.0, 1.0]], [[-1.0, -1.0]]])
    found = directions.whitened(positive.astype(np.float32), negative.astype(np.float32))
    assert found[1] / found[0] > 2  # the mean difference points along (1, 1)


# --- reports --------------------------------------------------------------------------------


def test_auroc_by_hand():
    up, down = np.array([3.0, 1.0]), np.array([2.0, 1.0, 0.0])
    assert directions.auroc(up, down) == pytest.approx((3 + 1.5) / 6)
    assert directions.auroc(np.ones(3), np.zeros(4)) == 1.0
    assert directions.auroc(np.ones(3), np.ones(4)) == 0.5


def test_a_clear_contrast_is_reported_so_and_noise_is_not():
    clear = directions.report(2, *states(n=100, noise=0.1, gap=4), residual_norm=4.0)
    assert clear.layer == 2
    assert clear.auroc > 0.99
    assert clear.agreement == 1.0
    assert clear.norm_ratio == pytest.approx(3.0, rel=0.05)
    rng = np.random.default_rng(0)
    noise = directions.report(0, *rng.normal(size=(2, 40, 200)).astype(np.float32), 1.0)
    assert 0.3 < noise.auroc < 0.7  # held out: fitted pairs alone would give 1.0
    assert 0.2 < noise.agreement < 0.8


def test_the_direction_judged_is_the_one_that_is_kept():
    control = np.tile(np.eye(6, dtype=np.float32)[5], (10, 1))
    sideways = np.outer([1, -1] * 5, np.eye(6)[0]).astype(np.float32)  # opposite in the two folds
    positive = 3 * control + sideways
    assert directions.report(0, positive, control, 1.0).agreement == 1.0
    assert directions.report(0, positive, control, 1.0, orthogonalise=True).agreement == 0.0


def test_one_pair_leaves_nothing_to_judge_on():
    report = directions.report(0, *states(n=1), residual_norm=1.0)
    assert report.auroc is None
    assert report.agreement is None
    assert report.norm_ratio > 0
