"""The parts of a text: what counts as a word, a sentence, a list item, an emoji.

Knows nothing of models or metrics: the same text has the same parts whoever wrote it.
"""

from __future__ import annotations

import re
import unicodedata

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


def folded(text: str) -> list[str]:
    """The words, any case."""
    return [word.casefold() for word in words(text)]


def list_marks(text: str) -> list[str]:
    """The marks of lines that begin as a list item does."""
    return _LIST_MARK.findall(text)


def share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing is 0."""
    return part / whole if whole else 0.0
