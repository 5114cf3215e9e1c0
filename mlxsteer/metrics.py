"""Numbers about the text of answers: the metrics that contrast sets name, and signs of loops.

Owns what counts as a word, a sentence and a list item. Knows nothing of models, tokens or
steering: the same text gives the same number whoever wrote it.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from mlxsteer.contrast import Metric
from mlxsteer.errors import ContrastError, UsageError
from mlxsteer.lexicon import FUNCTION_WORDS, NEGATIONS, NEGATIVE, POSITIVE

NEGATION_REACH = 3  # words: "not" turns "not a very good" around
LOOP_WORDS = 12  # "very, very, very good" is emphasis; this much of it is a loop

# Signs that belong to the letter before them; \w leaves them out, and would cut Hindi words.
_MARKS = "".join(
    mark for mark in map(chr, range(0x300, 0x1E00)) if unicodedata.category(mark).startswith("M")
)
_IDEOGRAPH = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_LETTER = f"(?:(?![{_IDEOGRAPH}])[^\\W_]|[{_MARKS}])"
_WORD = re.compile(
    f"[{_IDEOGRAPH}]|{_LETTER}+(?:(?:'(?={_LETTER})|(?<=\\d)[.,](?=\\d)){_LETTER}+)*"
)
_LIST_MARK = re.compile(
    r"^[ \t>]*(?:[-+*•‣◦–]|\*{0,2}\(?(?:\d{1,2}[.)]|[a-z]\))\*{0,2})[ \t]+(?=.*\w)",
    re.MULTILINE | re.IGNORECASE,
)
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|vs|e\.g|i\.e|cf|approx)\.", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’»)\]*_]*\s+|(?<=[。！？])|\n+")
_CLAUSE_END = re.compile(r"[.,;:!?…()\n—]+")
# 's is a contraction after these alone; after a noun it is a possessive.
_CONTRACTION = re.compile(
    r"[a-z']+n't|[a-z']+'(?:m|re|ve|ll|d)|y'all"
    r"|(?:s?he|it|that|this|there|here|what|who|where|when|how|why|let|one"
    r"|(?:every|some|any|no)(?:thing|one|body))'s"
)


def measure(metric: Metric, texts: Sequence[str]) -> list[float]:
    """The metric of each answer, in the unit that the metric's function documents.

    An answer without words is 0.0, except that `sentence_length` and `word_length` are nan:
    they are means over nothing. (Average them with `numpy.nanmean`.)
    Raises ContrastError when a language has no word list.
    """
    if metric.name == "language":
        return [language(text, metric.pattern or "") for text in texts]
    if metric.name in PATTERN_METRICS:
        pattern = metric.regex()
        return [PATTERN_METRICS[metric.name](text, pattern) for text in texts]
    return [TEXT_METRICS[metric.name](text) for text in texts]


# ---- parts of a text ------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The words as written, in NFC and with ' for ’.

    An apostrophe inside a word belongs to it (don't, l'eau), a hyphen parts two, a number keeps
    its point and commas (1,000.5). A Chinese character or a kana is a word of its own; other
    scripts without spaces (Thai) count from one space or punctuation mark to the next.
    """
    return _WORD.findall(unicodedata.normalize("NFC", text).replace("’", "'"))


def sentences(text: str) -> list[str]:
    """The pieces that hold a word, cut after . ! ? … and at line ends; list marks are dropped.

    So a list item, a heading and a line of verse are sentences. A few abbreviations (Dr., e.g.)
    end none; others do.
    """
    plain = _ABBREVIATION.sub(lambda found: found[0].replace(".", ""), _LIST_MARK.sub("", text))
    return [piece for piece in _SENTENCE_END.split(plain) if _WORD.search(piece)]


def _folded(text: str) -> list[str]:
    return [word.casefold() for word in words(text)]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# ---- metrics of one answer ------------------------------------------------------------------


def word_count(text: str) -> float:
    """Words."""
    return float(len(words(text)))


def uppercase_share(text: str) -> float:
    """Capitals / letters that have a case, 0..1; 0 when there are none."""
    capitals = sum(map(str.isupper, text))
    return _share(capitals, capitals + sum(map(str.islower, text)))


def language(text: str, code: str) -> float:
    """How surely the text is in the language `code`, 0..1, by its function words.

    With o words that only this language has and r that only a rival has, o / (o + r), for the
    rival that makes it least: against English alone, Spanish would pass for French. 0.5 when
    all that is found is shared; 0 when no function word is found. A text half in English and
    half in the language is near 0.5. Crude below about ten words.
    Raises ContrastError for a language without a list.
    """
    if code not in FUNCTION_WORDS:
        raise ContrastError(
            f"No word list for language {code!r}. Known: {', '.join(sorted(FUNCTION_WORDS))}."
            " For another, use metric regex_rate with a pattern of its commonest words."
        )
    found = [part for word in _folded(text) for part in _elided(word)]
    own = FUNCTION_WORDS[code]
    if not any(part in own for part in found):
        return 0.0
    rivals = (other for name, other in FUNCTION_WORDS.items() if name != code)
    return min(_preference(found, own - rival, rival - own) for rival in rivals)


def _elided(word: str) -> list[str]:
    """l'eau is l' and eau; it's stays whole."""
    if word in FUNCTION_WORDS["en"]:
        return [word]
    return word.replace("'", "' ").split()


def _preference(found: list[str], own: frozenset[str], rival: frozenset[str]) -> float:
    ours = sum(word in own for word in found)
    theirs = sum(word in rival for word in found)
    return ours / (ours + theirs) if ours or theirs else 0.5


def regex_share(text: str, pattern: re.Pattern[str]) -> float:
    """1.0 if the answer matches anywhere, else 0.0; the mean over answers is the share."""
    return float(pattern.search(text) is not None)


def regex_rate(text: str, pattern: re.Pattern[str]) -> float:
    """Matches per 100 words; a match of nothing is none."""
    matches = sum(bool(found[0]) for found in pattern.finditer(text))
    return 100 * _share(matches, len(words(text)))


def sentiment(text: str) -> float:
    """(p - n) / (p + n + 1), in (-1, 1), for p cheerful and n gloomy words; 0 when none.

    A negation up to three words before, in the same clause, turns a word around. The 1 keeps
    one word from deciding all. Crude: English only, a few hundred words, no irony, no context
    ("dark chocolate" is gloomy). Compare means over many answers, never two answers.
    """
    poles = [pole for clause in _CLAUSE_END.split(text) for pole in _poles(_folded(clause))]
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
    found = _folded(text)
    return 100 * _share(sum(bool(_CONTRACTION.fullmatch(word)) for word in found), len(found))


def exclamations(text: str) -> float:
    """Sentences that end in ! / sentences, 0..1. "Wow!!!" counts once, and "What?!" counts."""
    return _share_ending(text, "!！")


def questions(text: str) -> float:
    """Sentences that end in ? / sentences, 0..1."""
    return _share_ending(text, "?？")


def _share_ending(text: str, marks: str) -> float:
    pieces = sentences(text)
    # Behind the last word may stand a closing quote or an emoji as well as the mark.
    ends = [re.split(r"\w", piece)[-1] for piece in pieces]
    return _share(sum(any(mark in end for mark in marks) for end in ends), len(pieces))


def sentence_length(text: str) -> float:
    """Words per sentence; nan without words."""
    pieces = sentences(text)
    return sum(map(word_count, pieces)) / len(pieces) if pieces else math.nan


def word_length(text: str) -> float:
    """Letters and digits per word, apostrophes left out; nan without words."""
    found = words(text)
    letters = sum(character.isalnum() for word in found for character in word)
    return letters / len(found) if found else math.nan


def list_items(text: str) -> float:
    """Lines that begin as a list item does: -, *, •, 1., 2), a)."""
    return float(len(_LIST_MARK.findall(text)))


TEXT_METRICS: dict[str, Callable[[str], float]] = {
    "words": word_count,
    "uppercase_share": uppercase_share,
    "sentiment": sentiment,
    "contractions": contractions,
    "exclamations": exclamations,
    "questions": questions,
    "sentence_length": sentence_length,
    "word_length": word_length,
    "list_items": list_items,
}
PATTERN_METRICS: dict[str, Callable[[str, re.Pattern[str]], float]] = {
    "regex_share": regex_share,
    "regex_rate": regex_rate,
}


# ---- repetition -----------------------------------------------------------------------------


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
        grams = _runs(_folded(text), n)
        return len(set(grams)) / len(grams) if grams else 1.0

    return share


def _runs(found: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(found[i : i + length]) for i in range(len(found) - length + 1)]


def longest_repeat(text: str) -> int:
    """Words in the longest run that occurs again after it has ended, at once or later.

    Case and punctuation are ignored. 0 when no word occurs twice; a loop of k equal rounds of
    w words is w * (k // 2).
    """
    found = _folded(text)
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
    numbers = np.unique(np.array(_folded(text), dtype=str), return_inverse=True)[1]
    return any(
        same >= period and same + period >= LOOP_WORDS
        for period in range(1, len(numbers) // 2 + 1)
        for same in [_longest_true(numbers[period:] == numbers[:-period])]
    )


def _longest_true(flags: np.ndarray) -> int:
    """Length of the longest stretch of True in bool [T]."""
    breaks = np.flatnonzero(np.concatenate(([True], ~flags, [True])))
    return int(np.diff(breaks).max()) - 1
