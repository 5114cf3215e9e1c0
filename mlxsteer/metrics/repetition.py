"""Signs that a text repeats itself: distinct-n, the longest run that comes again, loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mlxsteer.errors import UsageError
from mlxsteer.metrics.text import folded

LOOP_WORDS = 12  # "very, very, very good" is emphasis; this much of it is a loop


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Mean over answers of different n-grams of words / n-grams, 0..1, any case.

    An answer of fewer than `n` words repeats nothing and is 1.0, so an empty one looks varied:
    read it beside the word count. nan when there are no answers. (distinct-n, Li et al. 2016,
    section 5, taken per answer: over a pool it would fall with the number of answers.)
    Raises UsageError when n < 1.
    """
    if n < 1:
        raise UsageError(f"distinct counts runs of n words, and n is {n}. Use 1 or more.")
    return sum(map(_distinct(n), texts)) / len(texts) if texts else math.nan


def _distinct(n: int) -> Callable[[str], float]:
    def share(text: str) -> float:
        grams = _runs(folded(text), n)
        return len(set(grams)) / len(grams) if grams else 1.0

    return share


def _runs(found: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(found[i : i + length]) for i in range(len(found) - length + 1)]


def longest_repeat(text: str) -> int:
    """Words in the longest run that occurs again after it has ended, at once or later.

    Case and punctuation are ignored. 0 when no word occurs twice; a loop of k equal rounds of
    w words is w * (k // 2).
    """
    found = folded(text)
    shorter, longer = 0, len(found) // 2 + 1  # where k words repeat, so do their first k - 1
    while longer - shorter > 1:
        length = (shorter + longer) // 2
        if _repeats(found, length):
            shorter = length
        else:
            longer = length
    return shorter


def _repeats(found: list[str], length: int) -> bool:
    first: dict[tuple[str, ...], int] = {}
    return any(i - first.setdefault(run, i) >= length for i, run in enumerate(_runs(found, length)))


def looping(text: str) -> bool:
    """Whether the answer is caught in a loop somewhere: a run of words that follows itself at
    once, any number of times, for `LOOP_WORDS` words or more in all.

    Case and punctuation are ignored. Rounds that differ in one word (a counter) are no loop here.
    """
    numbers = np.unique(np.array(folded(text), dtype=str), return_inverse=True)[1]
    return any(
        same >= period and same + period >= LOOP_WORDS
        for period in range(1, len(numbers) // 2 + 1)
        for same in [_longest_true(numbers[period:] == numbers[:-period])]
    )


def _longest_true(flags: np.ndarray) -> int:
    """Length of the longest stretch of True in bool [T]."""
    breaks = np.flatnonzero(np.concatenate(([True], ~flags, [True])))
    return int(np.diff(breaks).max()) - 1
