"""Small statistics over answers, numpy alone: intervals, ranks, where a value stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 4000  # bootstrap resamples
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval (95%)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


def mean_known(values: Sequence[float] | np.ndarray) -> float:
    """The mean of the finite `values`; nan when none is."""
    array = np.asarray(values, np.float64)
    known = array[np.isfinite(array)]
    return float(known.mean()) if len(known) else float("nan")


def mean_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """The mean of the finite `values` with its percentile bootstrap interval; nan when none is.

    Efron & Tibshirani (1993), chapter 13. Resamples values, so give paired differences.
    """
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    if not len(kept):
        return Interval(float("nan"), float("nan"), float("nan"))
    draws = np.random.default_rng(seed).choice(kept, (ROUNDS, len(kept))).mean(axis=1)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(kept.mean()), float(low), float(high))


def ratio_interval(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    seed: int = 0,
) -> Interval:
    """mean(numerators) / mean(denominators), resampled in pairs; nan where nothing is divided by.

    As `mean_interval`, of a ratio: pairs with a small denominator weigh little.
    """
    pairs = np.stack([np.asarray(v, np.float64) for v in (numerators, denominators)])
    if not pairs.size or not pairs[1].any():
        return Interval(float("nan"), float("nan"), float("nan"))
    count = pairs.shape[1]
    picks = np.random.default_rng(seed).integers(count, size=(ROUNDS, count))
    tops, bottoms = pairs[:, picks].mean(axis=-1)
    draws = tops[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(pairs[0].mean() / pairs[1].mean()), float(low), float(high))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 when either does not vary.

    Pairs with a value that was not measured (nan) are left out.
    """
    ranks = [_ranks(values) for values in _measured(x, y)]
    if not len(ranks[0]):
        return 0.0
    centred = [rank - rank.mean() for rank in ranks]
    scale = float(np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    return float(centred[0] @ centred[1]) / scale if scale else 0.0


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y on x over the measured pairs; 0 when x does not vary."""
    known, values = _measured(x, y)
    centred = known - mean_known(known)
    spread = float(centred @ centred)
    return float(centred @ values) / spread if spread else 0.0


def share_below(value: float, others: Sequence[float]) -> float:
    """Share of the finite `others` that `value` exceeds, ties counting half.

    nan without others, or where the value itself was not measured.
    """
    array = np.asarray(others, np.float64)
    array = array[np.isfinite(array)]
    if not len(array) or not np.isfinite(value):
        return float("nan")
    return float(np.mean(array < value) + 0.5 * np.mean(array == value))


def _measured(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """float64 [2, N]: the pairs of which both values are finite."""
    pairs = np.array([x, y], np.float64)
    return pairs[:, np.isfinite(pairs).all(axis=0)]


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
