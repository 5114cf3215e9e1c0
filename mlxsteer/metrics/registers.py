"""Register and mood of one answer, by the words it chooses: English only.

Knows nothing of models. Word lists are counted without context, so compare means over many
answers, never two answers.
"""

from __future__ import annotations

import re

from mlxsteer.metrics.lexicon import (
    FIRST_AND_SECOND_PERSON,
    FORMAL,
    HEDGES,
    INFORMAL,
    LEARNED_ENDINGS,
    NEGATIONS,
    NEGATIVE,
    POSITIVE,
)
from mlxsteer.metrics.text import folded, share

NEGATION_REACH = 3  # words: "not" turns "not a very good" around

_CLAUSE_END = re.compile(r"[.,;:!?…()\n—]+")
# 's is a contraction after these alone; after a noun it is a possessive.
_CONTRACTION = re.compile(
    r"[a-z']+n't|[a-z']+'(?:m|re|ve|ll|d)|y'all"
    r"|(?:s?he|it|that|this|there|here|what|who|where|when|how|why|let|one"
    r"|(?:every|some|any|no)(?:thing|one|body))'s"
)
_HEDGE = re.compile(rf"\b(?:{'|'.join(sorted(HEDGES, key=len, reverse=True))})\b")


def sentiment(text: str) -> float:
    """(p - n) / (p + n + 1), in (-1, 1), for p cheerful and n gloomy words; 0 when none.

    A negation up to three words before, in the same clause, turns a word around. The 1 keeps
    one word from deciding all. Crude: English only, a few hundred words, no irony, no context
    ("dark chocolate" is gloomy). Compare means over many answers, never two answers.
    """
    poles = [pole for clause in _CLAUSE_END.split(text) for pole in _poles(folded(clause))]
    return sum(poles) / (len(poles) + 1)


def _poles(clause: list[str]) -> list[int]:
    """+1 or -1 for every word of the clause that has a sentiment."""
    poles = []
    for i, word in enumerate(clause):
        pole = (word in POSITIVE) - (word in NEGATIVE)
        before = clause[max(0, i - NEGATION_REACH) : i]
        if pole:
            poles.append(-pole if any(map(_negates, before)) else pole)
    return poles


def _negates(word: str) -> bool:
    return word in NEGATIONS or word.endswith("n't")


def contractions(text: str) -> float:
    """English contractions (don't, we'll, it's) per 100 words; the 's of a possessive is none."""
    found = folded(text)
    return 100 * share(sum(bool(_CONTRACTION.fullmatch(word)) for word in found), len(found))


def hedging(text: str) -> float:
    """Hedges (perhaps, it depends, I think) per 100 words. A phrase counts once.

    Crude: the month of May and "he could swim" count too.
    """
    found = folded(text)
    return 100 * share(len(_HEDGE.findall(" ".join(found))), len(found))


def learned_words(text: str) -> float:
    """Learned words per 100 words: 8 letters or more, with an ending such as -tion or -ical."""
    found = folded(text)
    return 100 * share(sum(map(_learned, found)), len(found))


def _learned(word: str) -> bool:
    return len(word) >= 8 and word.endswith(LEARNED_ENDINGS)


def formality(text: str) -> float:
    """(formal - informal words) per 100 words, -100..100.

    Formal: learned words and those of a list (therefore, regarding). Informal: contractions,
    I, you and we in all their forms, and a list (stuff, yeah, kids). A stand-in without a
    tagger for the F-score of Heylighen & Dewaele (1999), which sets nouns, adjectives,
    prepositions and articles against pronouns, verbs, adverbs and interjections. Technical
    prose is formal here.
    """
    found = folded(text)
    return 100 * share(sum(map(_register, found)), len(found))


def _register(word: str) -> int:
    """+1 for a formal word, -1 for an informal one."""
    if word in INFORMAL or word in FIRST_AND_SECOND_PERSON or _CONTRACTION.fullmatch(word):
        return -1
    return int(word in FORMAL or _learned(word))
