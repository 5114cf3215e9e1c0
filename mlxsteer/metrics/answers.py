"""What one answer is like: its length, its layout, its marks.

Knows nothing of models, tokens or steering. An answer without words is 0 but where a function
says otherwise.
"""

from __future__ import annotations

import math
import re

from mlxsteer.metrics.text import emojis, list_marks, sentences, share, words


def word_count(text: str) -> float:
    """Words."""
    return float(len(words(text)))


def uppercase_share(text: str) -> float:
    """Capitals / letters that have a case, 0..1; 0 when there are none."""
    capitals = sum(map(str.isupper, text))
    return share(capitals, capitals + sum(map(str.islower, text)))


def regex_share(text: str, pattern: re.Pattern[str]) -> float:
    """1.0 if the answer matches anywhere, else 0.0; the mean over answers is the share."""
    return float(pattern.search(text) is not None)


def regex_rate(text: str, pattern: re.Pattern[str]) -> float:
    """Matches per 100 words; a match of nothing is none."""
    matches = sum(bool(found[0]) for found in pattern.finditer(text))
    return 100 * share(matches, len(words(text)))


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
    return share(sum(any(mark in end for mark in marks) for end in ends), len(pieces))


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
    return float(len(list_marks(text)))


def emoji(text: str) -> float:
    """Emoji per 100 words, an emoji counting as a word, 0..100."""
    found = len(emojis(text))
    return 100 * share(found, found + len(words(text)))
