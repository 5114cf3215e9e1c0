"""Answers that were written once are kept: a JSON-lines file, one line an answer, found by key.

A key holds everything that decides an answer (weights, prompt, steering, sampling), so a file
that was interrupted, or that serves several measurements, is simply read and added to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxsteer.errors import MlxsteerError
from mlxsteer.files import cache_dir
from mlxsteer.generation import Sampling
from mlxsteer.plan import Plan

if TYPE_CHECKING:
    from mlxsteer.model import Model


@dataclass(frozen=True)
class Kept:
    """One answer. loss: mean −log p of its tokens under the unsteered model; nan without tokens,
    None where it was not asked for.

    notes: what whoever asked wants to find in the line (strength, question); no part of the key.
    """

    key: str
    text: str
    tokens: tuple[int, ...]
    ended: bool
    loss: float | None
    notes: Mapping[str, Any] = field(default_factory=dict)


class AnswerStore:
    """The lines of a file, by key. Damaged lines (a crash cuts the last one) count as absent.

    Raises MlxsteerError for a file whose whole lines all hold something else.
    """

    def __init__(self, path: Path):
        self.path = path
        self._kept: dict[str, Kept] = {}
        try:
            # Not splitlines: an answer may hold U+2028 or U+0085, which JSON leaves as they are.
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise MlxsteerError(f"Cannot read {path}: {error.strerror or error}.") from error
        for line in lines:
            if kept := _parsed(line):
                self._kept[kept.key] = kept
        if not self._kept and any(line.strip() for line in lines[:-1]):
            raise MlxsteerError(
                f"{path} holds no answers of a sweep, and would be added to. Choose another file."
            )

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Kept | None:
        return self._kept.get(key)

    def add(self, answers: Iterable[Kept]) -> None:
        """Append, and have it on disk before going on. Raises MlxsteerError when it cannot be."""
        lines = []
        for kept in answers:
            self._kept[kept.key] = kept
            lines.append(json.dumps(_written(kept), ensure_ascii=False))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = _ends_with_a_line(self.path)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("" if whole else "\n") + "".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise MlxsteerError(
                f"Cannot write {self.path}: {error.strerror or error}. Free some space or choose"
                " another place, then run the command again: what was written is kept."
            ) from error


def model_store(model: Model) -> AnswerStore:
    """What was ever measured on exactly this model, in the cache folder."""
    fingerprint = model.stamp["weights_fingerprint"][:32]
    return AnswerStore(cache_dir() / "answers" / f"{fingerprint}.jsonl")


def key_of(model: Model, prompt: Sequence[int], plan: Plan, sampling: Sampling) -> str:
    """sha256 of everything that decides the answer."""
    facts = (
        model.stamp["weights_fingerprint"],
        model.dtype,
        model.config,
        tuple(prompt),
        plan.key,
        sorted(asdict(sampling).items()),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _written(kept: Kept) -> dict[str, Any]:
    line = {**kept.notes, **asdict(kept)}
    del line["notes"]
    if kept.loss != kept.loss:
        line["loss"] = "nan"  # strict JSON has no NaN
    return line


def _ends_with_a_line(path: Path) -> bool:
    """Whether what is added begins a line: the file is not there, empty, or was not cut."""
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
            return file.read(1) in (b"", b"\n")
    except FileNotFoundError:
        return True


def _parsed(line: str) -> Kept | None:
    try:
        data = json.loads(line)
        own = {name: data.pop(name) for name in ("key", "text", "tokens", "ended", "loss")}
        own["tokens"] = tuple(int(token) for token in own["tokens"])
        own["loss"] = None if own["loss"] is None else float(own["loss"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Kept(**own, notes=data)
