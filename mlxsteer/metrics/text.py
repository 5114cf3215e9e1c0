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
# A keycap, a flag of two letters, or a picture with its skin tone and what is joined to it.
_PICTURE = (
    "[\u231a\u231b\u23e9-\u23fa\u2600-\u26ff\u2705-\u270d\u2728\u274c-\u274e\u2753-\u2757\u2763"
    "\u2764\u2795-\u2797\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\U0001f004-\U0001f0cf\U0001f170-"
    "\U0001f19a\U0001f201-\U0001f265\U0001f300-\U0001f5ff\U0001f600-\U0001faff]"
)
_MODIFIERS = "\ufe0f?[\U0001f3fb-\U0001f3ff]?"
_EMOJI = re.compile(
    "[0-9#*]\ufe0f?\u20e3|[\U0001f1e6-\U0001f1ff]{2}"
    f"|{_PICTURE}{_MODIFIERS}(?:\u200d(?:{_PICTURE}|[\u2640\u2642]){_MODIFIERS})*"
)


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


def emojis(text: str) -> list[str]:
    """The emoji as written; a flag, a family or a skin tone is part of one."""
    return _EMOJI.findall(text)


def share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing is 0."""
    return part / whole if whole else 0.0
