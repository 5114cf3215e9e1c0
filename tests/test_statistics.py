"""Small statistics against scipy-free hand computations."""

from __future__ import annotations

import numpy as np
import pytest

from mlxsteer.statistics import mean_interval, mean_known, share_below, slope, spearman


def test_the_interval_of_a_normal_sample_is_about_two_standard_errors():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = mean_interval(values)
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [mean_interval(rng.normal(0, 1, 24), seed) for seed in range(200)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in found])
    assert 0.88 <= covered <= 0.99


def test_values_that_were_not_measured_are_left_out():
    assert mean_interval([1.0, float("nan"), 3.0]).mean == 2.0
    assert np.isnan(mean_interval([float("nan")]).low)


def test_rank_correlation_sees_order_alone():
    assert spearman([1, 2, 3, 4], [1, 10, 11, 1e6]) == pytest.approx(1)
    assert spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [5, 5, 5]) == 0
    # ranks 1, 2.5, 2.5, 4 against 1..4: cov 4.5, variances 5 and 4.5
    assert spearman([1, 2, 3, 4], [1, 2, 2, 3]) == pytest.approx(4.5 / np.sqrt(5 * 4.5))


def test_slope_is_that_of_the_least_squares_line():
    x = np.array([-5.0, -1, 0, 2, 7])
    y = 3 * x + np.array([0.1, -0.2, 0.05, 0.3, -0.1])
    assert slope(x, y) == pytest.approx(np.polyfit(x, y, 1)[0])
    assert slope([2, 2], [1, 5]) == 0


def test_a_tie_counts_half():
    assert share_below(2, [1, 2, 3, 4]) == pytest.approx(1.5 / 4)
    assert np.isnan(share_below(2, []))


def test_what_was_not_measured_has_no_rank():
    nan = float("nan")
    assert spearman([1, 2, 3, 4], [3, 2, 1, nan]) == pytest.approx(-1)
    assert slope([1, 2, 3, 4], [3, 2, 1, nan]) == pytest.approx(-1)
    assert spearman([1, 2], [nan, nan]) == slope([1, 2], [nan, nan]) == 0
    assert share_below(2, [1, nan]) == 1
    assert np.isnan(share_below(nan, [1, 2]))


@pytest.mark.filterwarnings("error")
def test_the_mean_of_nothing_is_nan_without_a_warning():
    assert np.isnan(mean_known([float("nan")]))
    assert np.isnan(mean_known([]))
    assert mean_known([1.0, float("nan"), 3.0]) == 2
