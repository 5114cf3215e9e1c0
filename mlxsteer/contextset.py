"""A document and questions about it: what a vector made from a document is learned and judged on.

Owns the two files, their checks and which questions are held out. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxsteer.contrast import DataPath, Fault, Messages
from mlxsteer.contrastfile import as_text, check_keys, located, plain_yaml, read_text, shown
from mlxsteer.errors import ContrastError

HELD_OUT_EVERY = 3  # questions 3, 6, 9, … are never extracted from
MIN_QUESTIONS = 6  # two to evaluate on
YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Question:
    """A question, and how its right answer is known: by a text that it holds, or a pattern."""

    text: str
    answer: str | None = None
    pattern: str | None = None

    @property
    def answerable(self) -> bool:
        return self.answer is not None or self.pattern is not None

    def answered_by(self, text: str) -> bool:
        """Whether `text` holds the right answer, in any case; an `answer` as whole words."""
        wanted = self.pattern
        if wanted is None:
            wanted = rf"(?<!\w){re.escape(self.answer or '')}(?!\w)"
        return bool(re.search(wanted, text, re.IGNORECASE))


@dataclass(frozen=True)
class ContextSet:
    """A document with questions; every third is held out. Raises ContrastError."""

    name: str
    document: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        if not self.document.strip():
            raise ContrastError(f"The document {self.name!r} is empty. Give one with text.")
        if len(self.questions) < MIN_QUESTIONS:
            raise ContrastError(
                f"{len(self.questions)} questions are too few: every third is kept for"
                f" evaluation, so give at least {MIN_QUESTIONS}, better 18 or more."
            )
        _no_repeats(self.questions)

    @classmethod
    def load(cls, document: str | Path, questions: str | Path) -> ContextSet:
        """The document, and its questions: one a line, or YAML (see docs/compression.md)."""
        text = read_text(Path(document), str(document))
        return cls(Path(document).stem, text.strip(), read_questions(Path(questions)))

    @property
    def held_out(self) -> tuple[int, ...]:
        """Indices of the questions that are for evaluation alone."""
        return tuple(range(HELD_OUT_EVERY - 1, len(self.questions), HELD_OUT_EVERY))

    @property
    def training(self) -> tuple[int, ...]:
        """Indices of the others."""
        return tuple(i for i in range(len(self.questions)) if i not in self.held_out)

    def asking(self, index: int) -> Messages:
        """Question `index` behind the document, in one user message.

        No system message: some templates have none, others say something else without one,
        which would make a second difference between the poles.
        """
        content = f"{self.document}\n\n{self.questions[index].text}"
        return ({"role": "user", "content": content},)

    def bare(self, index: int) -> Messages:
        """Question `index` alone."""
        return ({"role": "user", "content": self.questions[index].text},)

    @cached_property
    def document_sha256(self) -> str:
        return hashlib.sha256(self.document.encode()).hexdigest()

    @cached_property
    def questions_sha256(self) -> str:
        """Of what is asked, in order: giving an answer later leaves it as it is."""
        asked = "\n".join(question.text for question in self.questions)
        return hashlib.sha256(asked.encode()).hexdigest()


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a file: one a line, or a YAML list of texts and {question, answer}."""
    text = read_text(path, str(path))
    if path.suffix not in YAML:
        lines = (line.strip() for line in text.splitlines())
        return tuple(Question(line) for line in lines if line)
    places: dict[DataPath, int] = {}
    with located(str(path), places):
        rows = plain_yaml(text, places)
        if not isinstance(rows, list):
            raise Fault((), f"expected a list of questions, found {shown(rows)}.")
        return tuple(_question(row, (index,)) for index, row in enumerate(rows))


def _question(row: Any, path: DataPath) -> Question:
    if not isinstance(row, Mapping):
        return Question(as_text(row, path))
    check_keys(row, ("question", "answer", "pattern"), path)
    if "question" not in row:
        raise Fault(path, "key 'question' is missing. Add it.")
    if "answer" in row and "pattern" in row:
        raise Fault(path, "'answer' and 'pattern' both say what is right. Keep one of them.")
    texts = {key: as_text(value, (*path, key)) for key, value in row.items()}
    found = Question(texts.pop("question"), **texts)
    try:
        found.answered_by("")
    except re.error as error:
        raise Fault((*path, "pattern"), f"this is not a regular expression: {error}.") from error
    return found


def _no_repeats(questions: tuple[Question, ...]) -> None:
    first: dict[str, int] = {}
    for index, question in enumerate(questions):
        same = " ".join(re.findall(r"\w+", question.text.casefold()))
        if first.setdefault(same, index) != index:
            raise ContrastError(
                f"{question.text!r} is asked twice: questions {first[same] + 1} and {index + 1}."
                " One that is held out must be new."
            )
