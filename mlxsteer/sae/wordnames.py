"""A namer that needs no model: the words that a feature's snippets share, and a search for them.

A model's name is worth more only where it is detected better.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from mlxsteer.judge import Comparison
from mlxsteer.sae.index import Index, Snippet

AT_MOST = 3  # words of a name
NEAR = 6  # words around the one that fires
PEAK = 2.0  # how many times a word counts where the feature fires most
FEWEST = 2  # snippets that a word must be in

_WORD = re.compile(r"\w+")


class WordNamer:
    """Names a feature by the words that its snippets share and the index's text lacks."""

    def __init__(self, index: Index) -> None:
        self._texts = len(index.background)
        self._common = Counter(
            word for stretch in index.background for word in words_of(stretch.text)
        )

    def name(self, shown: Sequence[Snippet]) -> str:
        """Up to three words, by the share of snippets that have one × log of its rarity."""
        peaks, near = Counter[str](), Counter[str]()
        for one in shown:
            peaks.update({word_at(one)})
            near.update(words_around(one))
        scores = {
            word: (count + (PEAK - 1) * peaks[word]) * self._rarity(word)
            for word, count in near.items()
            if count >= FEWEST or len(shown) < FEWEST
        }
        best = sorted(scores, key=lambda word: (-scores[word], word))
        return " ".join(best[:AT_MOST] or [word for word, _ in peaks.most_common(1)])

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        """The share of the name's words in the first, less that in the second."""
        return [_held(one.trait, one.first) - _held(one.trait, one.second) for one in comparisons]

    def _rarity(self, word: str) -> float:
        return math.log((self._texts + 2) / (self._common[word] + 1))


def words_of(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(_WORD.findall(text.casefold()))


def word_at(one: Snippet) -> str:
    """The word that the token which fires is part of; the token itself where it is none."""
    text = one.before + one.token + one.after
    start = len(one.before) + len(one.token) - len(one.token.lstrip())
    end = len(one.before) + len(one.token)
    for found in _WORD.finditer(text):
        if found.start() < end and found.end() > start:
            return found.group().casefold()
    return one.token.strip().casefold()


def words_around(one: Snippet) -> set[str]:
    """The word that fires and up to six on each side."""
    before = _WORD.findall(one.before.casefold())[-NEAR:]
    after = _WORD.findall(one.after.casefold())[:NEAR]
    return {word_at(one), *before, *after} - {""}


def _held(name: str, text: str) -> float:
    found = words_of(text)
    hits = [word in found for word in words_of(name)]
    return sum(hits) / len(hits) if hits else 0.0
