"""What each feature of a dictionary fires on, kept beside it: the file that is searched.

Owns the index as data (density, largest and usual activation, top snippets, promoted tokens), its
file `features.json`, and the search in its words, which needs no model. `indexing` makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlxsteer.errors import SaeError
from mlxsteer.files import write_text
from mlxsteer.sae.labels import Label, labels_of

INDEX = "features.json"
WEIGHTS = {"label": 4.0, "peak": 2.0, "promoted": 1.0, "context": 0.5}


@dataclass(frozen=True)
class Snippet:
    """A place where a feature fires: the token, and the text around it."""

    before: str
    token: str
    after: str
    activation: float
    window: int

    def __str__(self) -> str:
        return f"{self.before}«{self.token}»{self.after}"


@dataclass(frozen=True)
class Feature:
    """One feature as the index knows it.

    density: share of states on which it fires. maximum, mean: its largest activation and its
    mean over all states. promoted: tokens, strongest first. label: its name, if it has one.
    """

    index: int
    density: float
    maximum: float
    mean: float
    promoted: tuple[str, ...]
    snippets: tuple[Snippet, ...]
    label: Label | None = None

    def row(self) -> dict[str, Any]:
        """The feature for a file, a table or a client."""
        return asdict(self)


@dataclass(frozen=True)
class Background:
    """A stretch of the text, whatever fires there: `fires` are the features that do."""

    text: str
    fires: frozenset[int]


@dataclass(frozen=True)
class Index:
    """The features that fire at all, stretches at random, and what was read.

    about: model, tokens, windows.
    """

    features: Mapping[int, Feature]
    background: tuple[Background, ...]
    about: Mapping[str, Any]


# --- the file -----------------------------------------------------------------------------------


def write(index: Index, folder: Path) -> Path:
    """Keep the index beside the dictionary in `folder`; labels have their own file."""
    rows = [replace(feature, label=None).row() for feature in index.features.values()]
    stretches = [{"text": one.text, "fires": sorted(one.fires)} for one in index.background]
    facts = {**index.about, "background": stretches, "features": rows}
    write_text(folder / INDEX, json.dumps(facts, ensure_ascii=False))
    return folder / INDEX


def read(folder: Path) -> Index:
    """The index beside the dictionary in `folder`, with its labels. SaeError when there is none."""
    file = folder / INDEX
    if not file.is_file():
        raise SaeError(
            f"{folder.name} has no index of its features yet. Make one: mlxsteer sae index"
            f" {folder.name}"
        )
    labels = labels_of(folder)
    index = _read(file, file.stat().st_mtime_ns)
    if not labels:
        return index
    named = {
        number: replace(feature, label=labels.get(number))
        for number, feature in index.features.items()
    }
    return replace(index, features=named)


@lru_cache(maxsize=2)
def _read(file: Path, changed: int) -> Index:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        rows = [_feature(row) for row in facts.pop("features")]
        stretches = tuple(
            Background(one["text"], frozenset(one["fires"])) for one in facts.pop("background")
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SaeError(
            f"{file} is damaged ({error}). Make it again: mlxsteer sae index {file.parent.name}"
        ) from None
    return Index({feature.index: feature for feature in rows}, stretches, facts)


def _feature(row: dict[str, Any]) -> Feature:
    snippets = tuple(Snippet(**one) for one in row["snippets"])
    return Feature(**{**row, "promoted": tuple(row["promoted"]), "snippets": snippets})


# --- search -------------------------------------------------------------------------------------


def search(index: Index, text: str, count: int = 20) -> list[Feature]:
    """Features whose label, firing tokens, promoted tokens or snippets hold the words of `text`.

    Best first: a word in the label counts 4, in the token it fires on 2, promoted 1, around it
    ½, each by the share of the snippets that hold it. Without words: the labelled ones, then
    the others by their largest activation.
    """
    words = _words(text)
    if not words:
        ranked = sorted(index.features.values(), key=lambda f: (f.label is None, -f.maximum))
        return ranked[:count]
    scored = [(_match(feature, words), feature) for feature in index.features.values()]
    scored.sort(key=lambda item: -item[0])
    return [feature for score, feature in scored[:count] if score > 0]


def _match(feature: Feature, words: Sequence[str]) -> float:
    n = max(1, len(feature.snippets))
    label = _words(feature.label.text) if feature.label else []
    peaks = [_words(_whole_word(one)) for one in feature.snippets]
    around = [_words(str(one).replace("«", "").replace("»", "")) for one in feature.snippets]
    promoted = [word for token in feature.promoted for word in _words(token)]
    return sum(
        WEIGHTS["label"] * (word in label)
        + WEIGHTS["peak"] * sum(word in peak for peak in peaks) / n
        + WEIGHTS["promoted"] * (word in promoted)
        + WEIGHTS["context"] * sum(word in text for text in around) / n
        for word in words
    )


def _whole_word(one: Snippet) -> str:
    """The token with the rest of the word that it is a part of."""
    start = re.search(r"\w*\Z", one.before)
    end = re.match(r"\w*", one.after)
    return (start[0] if start else "") + one.token + (end[0] if end else "")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
