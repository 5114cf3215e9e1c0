"""What may follow a term behind `@`: positions, a condition, schedules. Parses and prints them.

    suffix    = positions | when | "first(" count ")" | "after(" count ")" | "decay(" count ")"
    positions = answer | think | generated | prompt | all
    when      = "when(" name ["@" layer] ("<" | ">") number ")"

Each kind comes at most once, in any order. A name in `when` with a comma, a colon, an `@`, `<`,
`>` or a parenthesis is written in double quotes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxsteer.errors import UsageError, near_matches

POSITIONS = ("answer", "think", "generated", "prompt", "all")
WITH_PROMPT = ("prompt", "all")
COUNTS = ("first", "after", "decay")
KINDS = ("positions", "when", *COUNTS)  # as they are printed
EXAMPLES = {
    "when": "when(formal>0.5)",
    "first": "first(40)",
    "after": "after(10)",
    "decay": "decay(100)",
}

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_CALL = re.compile(r"(?P<word>[^()\"]*)\((?P<inside>.*)\)\s*\Z", re.DOTALL)
_WHEN = re.compile(
    r'\s*(?:"(?P<quoted>[^"]*)"|(?P<plain>[^"@<>()]*))\s*'
    r"(?:@(?P<layer>[^<>]*))?(?:(?P<sign>[<>])(?P<value>.*))?\Z",
    re.DOTALL,
)
_PLAIN_NAME = re.compile(r'[^\s",@<>():][^",@<>():]*\Z')
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+:[A-Za-z_][\w.-]*\Z")


@dataclass(frozen=True)
class When:
    """A condition: the direction `name` reads above (`>`) or below (`<`) `value`.

    layer: where it is read, 0-based; None leaves the choice to the probe.
    """

    name: str
    sign: str
    value: float
    layer: int | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.sign not in ("<", ">"):
            raise UsageError(f"{self.sign!r} is no comparison. Type < or >, as in {_WHEN_EXAMPLE}.")
        if not math.isfinite(self.value):
            raise UsageError(f"The value that {self.name!r} is compared with must be finite.")
        if self.layer is not None and self.layer < 0:
            raise UsageError(f"Layer {self.layer} is out of range: layers count from 0.")

    def __str__(self) -> str:
        plain = _PLAIN_NAME.match(self.name) or _HUB_NAME.match(self.name)
        name = self.name if plain else f'"{self.name}"'
        layer = "" if self.layer is None else f"@{self.layer}"
        return f"when({name}{layer}{self.sign}{format_number(self.value)})"


_WHEN_EXAMPLE = EXAMPLES["when"]


def parse_suffixes(piece: str, text: str, start: int) -> dict[str, Any]:
    """{kind: value} of `piece`, which is empty or begins with `@` and stands in `text` at `start`.

    UsageError points at the character.
    """
    found: dict[str, Any] = {}
    places: dict[str, int] = {}
    for word, offset in _split(piece, text, start):
        at = offset + blanks(word)
        kind, value = _parse(word.strip(), text, at)
        if kind in found:
            what = "positions are" if kind == "positions" else f"{kind} is"
            raise fault(text, at, f"{what} given twice")
        found[kind], places[kind] = value, at
    if against := contradiction(found):
        kind, reason = against
        raise fault(text, places[kind], reason)
    return found


def format_suffixes(values: Mapping[str, Any]) -> str:
    """The text that parses back to `values` ({kind: value or None})."""
    given = [(kind, values[kind]) for kind in KINDS if values.get(kind) is not None]
    return "".join(f"@{kind}({v})" if kind in COUNTS else f"@{v}" for kind, v in given)


def contradiction(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """(kind to blame, why): suffixes that do not go together; None when all do."""
    timed = [kind for kind in KINDS[1:] if values.get(kind) is not None]
    positions = values.get("positions")
    if timed and positions in WITH_PROMPT:
        return "positions", (
            f"{timed[0]} goes by generated tokens, and {positions!r} includes the prompt; choose"
            " answer, think or generated"
        )
    first, after = values.get("first"), values.get("after")
    if first is not None and after is not None and first <= after:
        return "first", f"first({first}) ends before after({after}) begins, so this never acts"
    return None


def check_suffixes(values: Mapping[str, Any]) -> None:
    """UsageError when a value is out of range or two do not go together."""
    positions = values.get("positions")
    if positions is not None and positions not in POSITIONS:
        raise UsageError(_unknown(positions))
    for kind in COUNTS:
        if (count := values.get(kind)) is not None and count < 1:
            raise UsageError(f"{kind}({count}) counts tokens, at least 1. Type {EXAMPLES[kind]}.")
    if against := contradiction(values):
        raise UsageError(f"{against[1][0].upper()}{against[1][1:]}.")


def check_name(name: str) -> None:
    """UsageError for a name that no steering text can hold."""
    if not name.strip() or '"' in name or name != name.strip():
        raise UsageError(f"{name!r} is not a vector's name. Type e.g. terse:3.")


def fault(text: str, position: int, reason: str) -> UsageError:
    """The error of a steering text, with a mark before the offending character."""
    position = min(position, len(text))
    marked = f"{text[:position]}⟨here⟩{text[position:]}"
    return UsageError(
        f"Steering text, character {position + 1}: {reason}. In: {marked}"
        "  Example: --steer 'terse:3, formal:-1@think'"
    )


def blanks(text: str) -> int:
    """How many blanks `text` begins with."""
    return len(text) - len(text.lstrip())


def format_number(value: float) -> str:
    """The shortest text that parses back to `value`."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


# --- parsing ------------------------------------------------------------------------------------


def _split(piece: str, text: str, start: int) -> list[tuple[str, int]]:
    """The words behind each `@` with their offsets; quotes and parentheses hold together."""
    words: list[tuple[str, int]] = []
    quoted, opened, begin = False, None, 1
    for index, char in enumerate(piece):
        if char == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif char == "(" and opened is None:
            opened = index
        elif char == ")":
            opened = None
        elif char == "@" and opened is None and index > 0:
            words.append((piece[begin:index], start + begin))
            begin = index + 1
    if opened is not None:
        raise fault(text, start + opened, "this parenthesis is never closed")
    return [*words, (piece[begin:], start + begin)] if piece else []


def _parse(word: str, text: str, at: int) -> tuple[str, Any]:
    """(kind, value) of one suffix that stands in `text` at `at`."""
    if word in POSITIONS:
        return "positions", word
    call = _CALL.match(word)
    name = call["word"].strip() if call else word
    if name not in EXAMPLES:
        raise fault(text, at, _unknown(word))
    if call is None:
        raise fault(text, at + len(word), f"{name} needs a parenthesis, as in {EXAMPLES[name]}")
    inside, at = call["inside"], at + call.start("inside")
    if name == "when":
        return name, _parse_when(inside, text, at)
    if not re.fullmatch(r"0*[1-9]\d{0,8}", inside.strip(), re.ASCII):
        raise fault(
            text,
            at + blanks(inside),
            f"{inside.strip()!r} is not a number of tokens; type a whole number from 1 on,"
            f" as in {EXAMPLES[name]}",
        )
    return name, int(inside)


def _parse_when(inside: str, text: str, at: int) -> When:
    match = _WHEN.match(inside)
    if match is None:
        raise fault(text, at, f"this is not a condition; type one such as {_WHEN_EXAMPLE}")
    name = (match["plain"] if match["quoted"] is None else match["quoted"]).strip()
    if not name:
        raise fault(text, at, f"the name of what is read is missing, as in {_WHEN_EXAMPLE}")
    if match["quoted"] is None and ":" in name and not _HUB_NAME.match(name):
        colon = at + inside.index(":")
        raise fault(text, colon, "a reading has no strength; compare it, as in " + _WHEN_EXAMPLE)
    if match["sign"] is None:
        end = at + len(inside.rstrip())
        raise fault(text, end, f"a comparison is missing here, as in {_WHEN_EXAMPLE}")
    value = match["value"].strip()
    if not re.fullmatch(NUMBER, value) or not math.isfinite(float(value)):
        place = at + match.start("value") + blanks(match["value"])
        raise fault(text, place, f"{value!r} is not a number to compare with, such as 0.5")
    return When(name, match["sign"], float(value), _layer(match, text, at))


def _layer(match: re.Match[str], text: str, at: int) -> int | None:
    layer = match["layer"]
    if layer is None:
        return None
    if not re.fullmatch(r"\d{1,9}", layer.strip(), re.ASCII):
        place = at + match.start("layer") + blanks(layer)
        raise fault(text, place, f"{layer.strip()!r} is not a layer, as in when(formal@12>0.5)")
    return int(layer)


def _unknown(word: str) -> str:
    if "(" in word:
        name = word.partition("(")[0].strip()
        near = near_matches(name, EXAMPLES)
        return f"unknown condition {word!r}.{near} Choose from {', '.join(EXAMPLES.values())}"
    near = near_matches(word, POSITIONS) or near_matches(word, EXAMPLES)
    return (
        f"unknown positions {word!r}.{near}"
        f" Choose from {', '.join((*POSITIONS, *EXAMPLES.values()))}"
    )
