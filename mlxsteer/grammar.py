"""The steering text: `terse:3, formal:-1@think`. Parses and prints terms; knows no vector.

    term      = name [":" number ["d" | "r"]] ["@" positions]
    positions = answer | think | generated | prompt | all
    steering  = term {"," term}

A name with a comma, a colon before a number or an `@` in it is written in double quotes.
`parse(format(x)) == x` for every list of terms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mlxsteer.errors import UsageError, near_matches

POSITIONS = ("answer", "think", "generated", "prompt", "all")
UNITS = ("", "d", "r")  # strength, raw dose, raw multiple of the stored arrays

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_STRENGTH = re.compile(rf"(?P<number>{_NUMBER})(?P<unit>[dr]?)\Z")
_PLAIN_NAME = re.compile(r'[^\s",@:][^",@]*\Z')


@dataclass(frozen=True)
class Term:
    """One steering term: a vector's name, a signed amount in `unit`, and where it acts.

    `positions` None means the vector's own default.
    """

    name: str
    amount: float = 1.0
    unit: str = ""
    positions: str | None = None

    def __post_init__(self) -> None:
        if not self.name.strip() or '"' in self.name or self.name != self.name.strip():
            raise UsageError(f"{self.name!r} is not a vector's name. Type e.g. terse:3.")
        if not math.isfinite(self.amount):
            raise UsageError(f"The strength of {self.name!r} must be a finite number.")
        if self.unit not in UNITS:
            raise UsageError(f"Unknown unit {self.unit!r}: d (dose) or r (raw multiple).")
        if self.positions is not None and self.positions not in POSITIONS:
            raise UsageError(_unknown_positions(self.positions))


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
        raise _error(text, text.rindex('"'), "this quote is never closed")
    pieces.append((start, text[start:]))
    if len(pieces) == 1 and not text.strip():
        return []
    return pieces


def _parse_term(piece: str, text: str, start: int) -> Term:
    start += _blanks(piece)
    piece = piece.strip()
    if not piece:
        raise _error(text, start, "a term is missing here")
    name, rest, offset = _split_name(piece, text, start)
    body, at, positions = rest.partition("@")
    if at and positions.strip() not in POSITIONS:
        at_word = start + offset + len(body) + 1 + _blanks(positions)
        raise _error(text, at_word, _unknown_positions(positions.strip()))
    where = positions.strip() if at else None
    body = body.rstrip()
    if not body:
        return Term(name, positions=where)
    match = _STRENGTH.match(body[1:].strip())
    if not match or not math.isfinite(float(match["number"])):
        raise _error(
            text,
            start + offset + 1 + _blanks(body[1:]),
            f"{body[1:].strip()!r} is not a strength; type a number such as 3 or -1.5,"
            " 0.2d for a dose, 0.5r for a raw multiple",
        )
    return Term(name, float(match["number"]), match["unit"], where)


def _blanks(text: str) -> int:
    """How many blanks `text` begins with."""
    return len(text) - len(text.lstrip())


def _split_name(piece: str, text: str, start: int) -> tuple[str, str, int]:
    """(name, what follows it, offset of that): what follows is empty or begins with : or @."""
    if piece.startswith('"'):
        end = piece.index('"', 1)
        name, rest = piece[1:end], piece[end + 1 :]
        if rest.strip() and rest.lstrip()[0] not in ":@":
            raise _error(text, start + end + 1, "after a quoted name comes : or @")
        if not name.strip():
            raise _error(text, start, "the name is empty")
        return name.strip(), rest.lstrip(), end + 1 + _blanks(rest)
    body = piece.partition("@")[0]
    # A Hub name is owner/repo:name, so only a colon before something that is, or was meant as,
    # a number begins the strength.
    cut = body.rfind(":")
    if cut >= 0 and _is_hub_colon(body, cut):
        cut = -1
    cut = len(body) if cut < 0 else cut
    if not body[:cut].strip():
        raise _error(text, start, "the name is missing before this")
    return body[:cut].strip(), piece[cut:], cut


def _is_hub_colon(body: str, cut: int) -> bool:
    after = body[cut + 1 :].strip()
    owner = body[:cut].strip()
    return "/" in owner and ":" not in owner and bool(re.match(r"[A-Za-z_]", after))


def _format_term(term: Term) -> str:
    name = term.name if _is_plain(term.name) else f'"{term.name}"'
    amount = f":{_number(term.amount)}{term.unit}"
    return name + amount + (f"@{term.positions}" if term.positions else "")


def _is_plain(name: str) -> bool:
    if not _PLAIN_NAME.match(name):
        return False
    cut = name.rfind(":")
    return cut < 0 or _is_hub_colon(name, cut)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _unknown_positions(positions: str) -> str:
    return (
        f"unknown positions {positions!r}.{near_matches(positions, POSITIONS)}"
        f" Choose from {', '.join(POSITIONS)}"
    )


def _error(text: str, position: int, reason: str) -> UsageError:
    position = min(position, len(text))
    marked = f"{text[:position]}⟨here⟩{text[position:]}"
    return UsageError(
        f"Steering text, character {position + 1}: {reason}. In: {marked}"
        "  Example: --steer 'terse:3, formal:-1@think'"
    )
