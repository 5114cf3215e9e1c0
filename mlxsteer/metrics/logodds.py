"""Which words tell two groups of texts apart, and how far an answer leans to one of them.

Log-odds ratio with an informative Dirichlet prior: Monroe, Colaresi & Quinn (2008), "Fightin'
Words", section 3.5. Any language; words are counted as `text.words` cuts them, any case.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mlxsteer.errors import UsageError
from mlxsteer.metrics.text import folded, share

PRIOR_WORDS = 100.0  # how many words of the prior's texts each group is given beforehand


@dataclass(frozen=True)
class WordOdds:
    """A word, the log of its odds in group A over those in group B (nats), and its z-score."""

    word: str
    log_odds: float
    z: float


def log_odds(
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    prior_texts: Sequence[str] | None = None,
    prior_words: float = PRIOR_WORDS,
) -> list[WordOdds]:
    """Every word of either group, from those most typical of A to those most typical of B.

    prior_texts: a background whose word frequencies, as if of `prior_words` words, are expected
    of both groups; by default the two groups together. (Formulas 16 and 22 there, z by 20 and
    21: the variance is 1 / (count + prior) of each group.)
    Raises UsageError when a group holds no word or prior_words is not above 0.
    """
    counts_a, counts_b = _counts(texts_a), _counts(texts_b)
    if not counts_a or not counts_b:
        raise UsageError("Log-odds compare two groups of texts, and one holds no words.")
    if prior_words <= 0:
        raise UsageError(f"prior_words is {prior_words:g}: use a number of words above 0.")
    # A word that the background lacks is taken to occur once there: no prior may be 0.
    background = counts_a + counts_b if prior_texts is None else _counts(prior_texts)
    vocabulary = set(counts_a) | set(counts_b)
    known = {word: background[word] or 1 for word in set(background) | vocabulary}
    scale = prior_words / sum(known.values())
    total_a, total_b = (sum(counts.values()) + prior_words for counts in (counts_a, counts_b))
    found = []
    for word in vocabulary:
        a, b = (counts[word] + known[word] * scale for counts in (counts_a, counts_b))
        difference = math.log(a / (total_a - a)) - math.log(b / (total_b - b))
        found.append(WordOdds(word, difference, difference / math.sqrt(1 / a + 1 / b)))
    return sorted(found, key=lambda one: (-one.z, one.word))


def topic(text: str, about: Sequence[str], other: Sequence[str]) -> float:
    """Mean log-odds of the answer's words, learned from texts about the topic against others.

    In nats per word; above 0 leans to the topic. Words that the texts do not hold count 0.
    """
    weights = _weights(tuple(about), tuple(other))
    found = folded(text)
    return share(sum(weights.get(word, 0.0) for word in found), len(found))


@lru_cache(maxsize=32)
def _weights(about: tuple[str, ...], other: tuple[str, ...]) -> dict[str, float]:
    return {one.word: one.log_odds for one in log_odds(about, other)}


def _counts(texts: Iterable[str]) -> Counter[str]:
    return Counter(word for text in texts for word in folded(text))
