"""Contrast sets: what a trait is, as pairs of prompts or texts that differ in it alone.

Owns the data, its checks and the order in which pairs are dealt; `contrastfile` reads the YAML.
Knows nothing of models, chat templates or how a metric is computed.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxsteer.errors import ContrastError, near_matches
from mlxsteer.grammar import POSITIONS

# How a wording meets a question, and where the result is read. An instruction shows at the
# last prompt token; language, capitals and topics show only over texts or answers.
COMBINES = {
    "append": "last_prompt",  # user: question, then the instruction
    "prepend": "last_prompt",  # user: the instruction, then the question
    "system": "last_prompt",  # system: the instruction; user: the question
    "persona": "last_prompt",  # system: "You are " + the wording + "."; user: the question
    "texts": "text_mean",  # two plain texts, no question
    "answers": "answer_mean",  # user: the question; assistant: the answer
}

# The metrics that show a trait, and what `pattern` holds for those that take one.
METRICS: dict[str, str | None] = {
    "words": None,
    "uppercase_share": None,
    "language": "a language code, such as fr",
    "regex_share": "a regular expression; the metric is the share of answers that match",
    "regex_rate": "a regular expression; the metric is matches per 100 words",
    "sentiment": None,
    "contractions": None,
    "exclamations": None,
    "questions": None,
    "sentence_length": None,
    "word_length": None,
    "list_items": None,
    "formality": None,
    "learned_words": None,
    "hedging": None,
    "emoji": None,
    "ended": None,
    "topic": None,
}

Messages = tuple[dict[str, str], ...]
DataPath = tuple[str | int, ...]  # where in a set: ("positive", 2)


class Fault(ContrastError):
    """A fault at a path inside the set; the file reader turns the path into a line."""

    def __init__(self, path: DataPath, message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Pair:
    """One contrast pair: chat messages for the caller's template, or plain texts."""

    positive: Messages | str
    negative: Messages | str
    index: int


@dataclass(frozen=True)
class Metric:
    """The number that shows a trait, and which way more of the name moves it.

    examples: for `topic`, the texts of both poles, from which its words are learned; a set of
    texts or answers gives its own.
    """

    name: str
    direction: str = "up"
    label: str = ""
    pattern: str | None = None
    examples: tuple[tuple[str, ...], tuple[str, ...]] = field(default=((), ()), repr=False)

    def __post_init__(self) -> None:
        one_of(self.name, METRICS, ("metric", "name"), "metric")
        one_of(self.direction, ("up", "down"), ("metric", "direction"), "direction")
        wanted = METRICS[self.name]
        if wanted and not self.pattern:
            raise Fault(("metric", "name"), f"metric {self.name!r} needs a 'pattern': {wanted}.")
        if self.pattern and not wanted:
            raise Fault(
                ("metric", "pattern"), f"metric {self.name!r} takes no 'pattern'. Remove it."
            )
        if self.name == "topic" and not all(self.examples):
            raise Fault(
                ("metric", "name"),
                "metric 'topic' learns its words from texts of both poles, so it needs combine"
                " 'texts' or 'answers'. For other sets, use regex_rate with the topic's words.",
            )
        if self.name.startswith("regex"):
            self.regex()
        if self.name == "language" and not re.fullmatch("[a-z]{2}", self.pattern or ""):
            raise Fault(
                ("metric", "pattern"),
                f"{self.pattern!r} is not a language code of two letters, such as fr.",
            )

    def regex(self) -> re.Pattern[str]:
        """The pattern as every part of the package matches it: any case, ^ and $ at lines."""
        try:
            return re.compile(self.pattern or "", re.IGNORECASE | re.MULTILINE)
        except re.error as error:
            raise Fault(
                ("metric", "pattern"), f"{self.pattern!r} is not a regular expression: {error}."
            ) from error


@dataclass(frozen=True)
class ExtractDefaults:
    """Where a trait is read and written unless the caller says otherwise.

    `band` is a pair of fractions of depth; None leaves the choice to the extractor. `acts_on` is
    which positions the vector steers by default.
    """

    position: str = "last_prompt"
    band: tuple[float, float] | None = None
    norm_preserving: bool = False
    acts_on: str = "answer"

    def __post_init__(self) -> None:
        one_of(self.position, set(COMBINES.values()), ("extract", "position"), "reading position")
        one_of(self.acts_on, POSITIONS, ("extract", "acts_on"), "steered positions")
        if self.band is not None and not 0 <= self.band[0] < self.band[1] <= 1:
            raise Fault(
                ("extract", "band"),
                f"band {list(self.band)} must be two fractions of depth, low then high,"
                " such as [0.35, 0.70].",
            )


@dataclass(frozen=True)
class ContrastSet:
    """A trait: two matched poles, what they are asked, and how to see the difference.

    `positive[i]` is matched to `negative[i]`: wordings of an instruction, or, when `combine`
    is "texts" or "answers", whole texts or answers (`questions[i]` goes with answer i).
    `instruction` asks for the trait in words, where the poles themselves are no instructions.
    Raises ContrastError when the parts do not fit.
    """

    name: str
    description: str
    positive_label: str
    negative_label: str
    combine: str
    questions: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    held_out: tuple[str, ...]
    metric: Metric
    extract: ExtractDefaults = field(default_factory=ExtractDefaults)
    license: str = ""
    instruction: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise Fault(
                ("name",),
                f"{self.name!r} cannot be a name: use letters, digits, '-' and '_'."
                " A set in a file has the file's name.",
            )
        one_of(self.combine, COMBINES, ("combine",), "combine")
        _check_poles(self)
        _check_questions(self)
        if self.extract.position != COMBINES[self.combine]:
            raise Fault(
                ("extract", "position"),
                f"combine {self.combine!r} is read at {COMBINES[self.combine]!r}, not at"
                f" {self.extract.position!r}.",
            )

    @classmethod
    def load(cls, path_or_name: str | Path) -> ContrastSet:
        """A set by name (the user's, then the bundled ones) or by the path of a .yaml file.

        A server takes a name from a request only if it is in `available()`.
        """
        from mlxsteer import contrastfile

        return contrastfile.load(path_or_name)

    @classmethod
    def from_yaml(cls, text: str, source: str) -> ContrastSet:
        """The set written in `text`; errors begin with `source:line`. Its name is the file's."""
        from mlxsteer import contrastfile

        return contrastfile.from_yaml(text, source)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ContrastSet:
        """The set held in the same keys as its YAML file, and `name`."""
        from mlxsteer import contrastfile

        return contrastfile.from_dict(data)

    @property
    def max_pairs(self) -> int:
        """How many different pairs the set can deal."""
        if self.combine in ("texts", "answers"):
            return len(self.positive)
        return len(self.questions) * len(self.positive)

    def pairs(self, n: int | None = None, seed: int = 0) -> list[Pair]:
        """The first `n` pairs (all when None) in the order that `seed` decides.

        However many are dealt, the uses of two questions, or of two wordings, differ by at
        most one, so 8 pairs already vary the wording. More pairs begin with the fewer.
        Raises ContrastError when `n` is not in 1..max_pairs.
        """
        if n is None:
            n = self.max_pairs
        if not 1 <= n <= self.max_pairs:
            raise ContrastError(
                f"{self.name} can deal 1 to {self.max_pairs} pairs, not {n}. Ask for fewer, or"
                " add questions or wordings to the set."
            )
        shuffle = random.Random(seed)
        wordings = shuffle.sample(range(len(self.positive)), len(self.positive))
        if self.combine in ("texts", "answers"):
            return [self._pair(index, i, i) for index, i in enumerate(wordings[:n])]
        questions = shuffle.sample(range(len(self.questions)), len(self.questions))
        # Walking both lists at once meets lcm(Q, W) different combinations; then the wordings
        # move on by one, and the walk meets the next lcm.
        round_trip = math.lcm(len(questions), len(wordings))
        return [
            self._pair(
                k,
                questions[k % len(questions)],
                wordings[(k + k // round_trip) % len(wordings)],
            )
            for k in range(n)
        ]

    def asking(self, question: str, index: int = 0) -> Messages | None:
        """The prompt that asks for the trait in words: the rival of steering.

        A set of instructions takes wording `index` (they go round); the others their
        `instruction`, behind the question. None when a set has neither.
        """
        if self.combine not in ("texts", "answers"):
            return _messages(self.combine, question, self.positive[index % len(self.positive)])
        return _messages("append", question, self.instruction) if self.instruction else None

    def _pair(self, index: int, question: int, wording: int) -> Pair:
        if self.combine == "texts":
            return Pair(self.positive[wording], self.negative[wording], index)
        asked = self.questions[question]
        return Pair(
            _messages(self.combine, asked, self.positive[wording]),
            _messages(self.combine, asked, self.negative[wording]),
            index,
        )

    def digest(self) -> str:
        """sha256 of what decides the pairs: editing a description or a metric keeps it."""
        content = [
            self.combine,
            self.extract.position,
            self.questions,
            self.positive,
            self.negative,
        ]
        canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def available() -> list[str]:
    """The names that `ContrastSet.load` knows: bundled ones and the user's."""
    from mlxsteer import contrastfile

    return contrastfile.available()


def _messages(combine: str, question: str, wording: str) -> Messages:
    user = {"role": "user", "content": question}
    if combine == "append":
        return ({"role": "user", "content": f"{question} {wording}"},)
    if combine == "prepend":
        return ({"role": "user", "content": f"{wording} {question}"},)
    if combine == "answers":
        return (user, {"role": "assistant", "content": wording})
    content = f"You are {wording}." if combine == "persona" else wording
    return ({"role": "system", "content": content}, user)


# ---- checks of the whole --------------------------------------------------------------------


def _same(text: str) -> str:
    """What two questions share when only case, spacing or punctuation tells them apart."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _check_poles(group: ContrastSet) -> None:
    paired = group.combine in ("texts", "answers")
    if len(group.positive) != len(group.negative):
        raise Fault(
            ("negative",),
            f"{len(group.positive)} positive wordings but {len(group.negative)} negative ones:"
            " wording i of one pole is matched to wording i of the other.",
        )
    for i, (positive, negative) in enumerate(zip(group.positive, group.negative, strict=True)):
        if positive == negative:
            raise Fault(
                ("pairs", i) if paired else ("negative", i),
                f"pair {i + 1} says the same in both poles: {positive[:40]!r}.",
            )
    if not paired:
        _no_repeats(group.positive, ("positive",))
        _no_repeats(group.negative, ("negative",))


def _check_questions(group: ContrastSet) -> None:
    answers = group.combine == "answers"
    if answers and len(group.questions) != len(group.positive):
        raise Fault(
            ("pairs",), f"{len(group.questions)} questions for {len(group.positive)} answers."
        )
    _no_repeats(group.questions, ("pairs",) if answers else ("questions",))
    _no_repeats(group.held_out, ("held_out",))
    trained = {_same(question) for question in group.questions}
    for i, question in enumerate(group.held_out):
        if _same(question) in trained:
            raise Fault(
                ("held_out", i),
                f"{question!r} is also a training question: a held-out one must be new.",
            )


def _no_repeats(texts: tuple[str, ...], path: DataPath) -> None:
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        if first.setdefault(_same(text), i) != i:
            raise Fault(
                (*path, i), f"{text!r} is given twice: items {first[_same(text)] + 1} and {i + 1}."
            )


def one_of(value: str, known: Iterable[str], path: DataPath, what: str) -> None:
    names = sorted(known)
    if value not in names:
        raise Fault(
            path,
            f"unknown {what} {value!r}.{near_matches(str(value), names)}"
            f" Known: {', '.join(names)}.",
        )
