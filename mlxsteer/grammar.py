"""The steering text: `terse:3, formal:-1@think@first(40)`. Parses and prints; knows no vector.

    steering = term {"," term}
    term     = name [":" number ["d" | "r"]] {"@" suffix}

Suffixes say where and when a term acts (see `suffixes`); docs/grammar.md has the whole on a page.
A name with a comma, a colon before a number or an `@` in it is written in double quotes.
`parse(format(x)) == x` for every list of terms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mlxsteer.errors import UsageError
from mlxsteer.suffixes import (
    COUNTS,
    NUMBER,
    POSITIONS,
    When,
    blanks,
    check_name,
    check_suffixes,
    fault,
    format_number,
    format_suffixes,
    parse_suffixes,
)

__all__ = ["COUNTS", "POSITIONS", "UNITS", "Term", "When", "format", "parse"]

UNITS = ("", "d", "r")  # strength, raw dose, raw multiple of the stored arrays

_STRENGTH = re.compile(rf"(?P<number>{NUMBER})(?P<unit>[dr]?)\Z")
_PLAIN_NAME = re.compile(r'[^\s",@:][^",@]*\Z')


@dataclass(frozen=True)
class Term:
    """One steering term: a vector's name, a signed amount in `unit`, where and when it acts.

    positions: None means the vector's own default. when: a condition on a reading. first, after,
    decay: generated tokens, counted from the start of an answer.
    """

    name: str
    amount: float = 1.0
    unit: str = ""
    positions: str | None = None
    when: When | None = None
    first: int | None = None
    after: int | None = None
    decay: int | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if not math.isfinite(self.amount):
            raise UsageError(f"The strength of {self.name!r} must be a finite number.")
        if self.unit not in UNITS:
            raise UsageError(f"Unknown unit {self.unit!r}: d (dose) or r (raw multiple).")
        check_suffixes(vars(self))

    @property
    def timed(self) -> bool:
        """Whether it has a condition or a schedule."""
        return self.when is not None or any(getattr(self, kind) is not None for kind in COUNTS)


def parse(text: str) -> list[Term]:
    """The terms of a steering text, in order. UsageError points at the character."""
    terms = []
    for start, piece in _split(text):
        terms.append(_parse_term(piece, text, start))
    return terms


def format(terms: Iterable[Term]) -> str:
    """The text that parses back to `terms`."""
    return ", ".join(map(_format_term, terms))


def _split(text: str) -> list[tuple[int, str]]:
    """Comma-separated pieces with their offsets; commas inside quotes do not separate."""
    pieces, start, quoted = [], 0, False
    for index, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif char == "," and not quoted:
            pieces.append((start, text[start:index]))
            start = index + 1
    if quoted:
        raise fault(text, text.rindex('"'), "this quote is never closed")
    pieces.append((start, text[start:]))
    if len(pieces) == 1 and not text.strip():
        return []
    return pieces


def _parse_term(piece: str, text: str, start: int) -> Term:
    start += blanks(piece)
    piece = piece.strip()
    if not piece:
        raise fault(text, start, "a term is missing here")
    name, rest, offset = _split_name(piece, text, start)
    body = rest.partition("@")[0]
    suffixes = parse_suffixes(rest[len(body) :], text, start + offset + len(body))
    if not body.strip():
        return Term(name, **suffixes)
    strength = body[1:].strip()
    match = _STRENGTH.match(strength)
    if not match or not math.isfinite(float(match["number"])):
        raise fault(
            text,
            start + offset + 1 + blanks(body[1:]),
            f"{strength!r} is not a strength; type a number such as 3 or -1.5,"
            " 0.2d for a dose, 0.5r for a raw multiple",
        )
    return Term(name, float(match["number"]), match["unit"], **suffixes)


def _split_name(piece: str, text: str, start: int) -> tuple[str, str, int]:
    """(name, what follows it, offset of that): what follows is empty or begins with : or @."""
    if piece.startswith('"'):
        end = piece.index('"', 1)
        name, rest = piece[1:end], piece[end + 1 :]
        if rest.strip() and rest.lstrip()[0] not in ":@":
            raise fault(text, start + end + 1, "after a quoted name comes : or @")
        if not name.strip():
            raise fault(text, start, "the name is empty")
        return name.strip(), rest.lstrip(), end + 1 + blanks(rest)
    body = piece.partition("@")[0]
    # A Hub name is owner/repo:name, so only a colon before something that is, or was meant as,
    # a number begins the strength.
    cut = body.rfind(":")
    if cut >= 0 and _is_hub_colon(body, cut):
        cut = -1
    cut = len(body) if cut < 0 else cut
    if not body[:cut].strip():
        raise fault(text, start, "the name is missing before this")
    return body[:cut].strip(), piece[cut:], cut


def _is_hub_colon(body: str, cut: int) -> bool:
    after = body[cut + 1 :].strip()
    owner = body[:cut].strip()
    return "/" in owner and ":" not in owner and bool(re.match(r"[A-Za-z_]", after))


def _format_term(term: Term) -> str:
    name = term.name if _is_plain(term.name) else f'"{term.name}"'
    amount = f":{format_number(term.amount)}{term.unit}"
    return name + amount + format_suffixes(vars(term))


def _is_plain(name: str) -> bool:
    if not _PLAIN_NAME.match(name):
        return False
    cut = name.rfind(":")
    return cut < 0 or _is_hub_colon(name, cut)
