"""Names features: a model reads what a feature fires on, and its name is put to a test.

Half of a feature's snippets are shown to find the name. The other half are the test: beside a
stretch in which the feature is silent, the namer must pick the one that fits the name, asked in
both orders. Chance is 0.5. Knows an index and whom to ask, not the model that is read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlxsteer.errors import SaeError
from mlxsteer.judge import Comparison
from mlxsteer.sae.index import Feature, Index, Snippet
from mlxsteer.sae.labels import Label

SHOWN = 6
PAIRS = 6
FEWEST = 4  # snippets: two to name by, two to test with
LONGEST = 48  # characters of a name
DENSITIES = (0.0005, 0.05)  # of features that are worth a name: neither flukes nor everywhere


class Namer(Protocol):
    """Who names, and is put to the test."""

    def name(self, shown: Sequence[Snippet]) -> str:
        """What the places where these fire have in common, in a few words."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        """Per comparison -1..1: above 0 when the first fits better; nan when unreadable."""


class Judge(Protocol):
    """A model that can be asked: those of `judgebackends`."""

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """The reply to each prompt."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        """See `Namer`."""


@dataclass(frozen=True)
class ModelNamer:
    """Lets a model name features."""

    judge: Judge

    def name(self, shown: Sequence[Snippet]) -> str:
        return self.judge.ask([naming_prompt(shown)])[0]

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        return self.judge.compare(comparisons)


@dataclass(frozen=True)
class SnippetPair(Comparison):
    """Two stretches of text, of which one should fit a feature's name."""

    @property
    def prompt(self) -> str:
        return (
            f"Two pieces of text are given below.\n\nText A:\n{self.first}\n\nText B:\n"
            f"{self.second}\n\nDescription: {self.trait}\n\nWhich text fits the description better?"
        )


def choose(index: Index, count: int, seed: int = 0) -> list[int]:
    """`count` features by lot, of those with snippets enough that fire on 0.05% to 5% of states."""
    low, high = DENSITIES
    fit = [
        number
        for number, feature in sorted(index.features.items())
        if low <= feature.density <= high and len(feature.snippets) >= 2 * FEWEST
    ]
    return sorted(random.Random(seed).sample(fit, min(count, len(fit))))


def label(
    index: Index,
    numbers: Iterable[int],
    namer: Namer,
    by: str,
    *,
    seed: int = 0,
    on_label: Callable[[int, Label], None] | None = None,
) -> dict[int, Label]:
    """{feature: its name with its score}. by: who the namer is, for the record.

    on_label: called with each as it is found. Raises SaeError for a feature that cannot be
    tested: too few snippets, or none without it.
    """
    for number in numbers:
        if number not in index.features:
            raise SaeError(
                f"Feature {number} never fires in the index's text, or the dictionary has fewer:"
                " nothing to name. To find some that do: mlxsteer sae find TEXT"
            )
    found: dict[int, Label] = {}
    for number in numbers:
        draw = random.Random(f"{seed} {number}")
        found[number] = _label(index, index.features[number], namer, by, draw)
        if on_label:
            on_label(number, found[number])
    return found


def naming_prompt(shown: Sequence[Snippet]) -> str:
    """What a namer is asked; the word that a feature fires on stands in « »."""
    lines = "\n".join(f"{i}. {_line(str(one))}" for i, one in enumerate(shown, 1))
    return (
        "One feature of a language model becomes active at the words marked «like this»:\n\n"
        f"{lines}\n\nWhat do the marked places have in common? Reply with a name of one to four"
        " words and nothing else."
    )


def _label(index: Index, feature: Feature, namer: Namer, by: str, draw: random.Random) -> Label:
    silent = [one.text for one in index.background if feature.index not in one.fires]
    if len(feature.snippets) < FEWEST or len(silent) < 2:
        raise SaeError(
            f"Feature {feature.index} has {len(feature.snippets)} snippets and {len(silent)}"
            f" stretches without it; {FEWEST} and 2 are needed. Choose others: mlxsteer sae find"
        )
    name = _clean(namer.name(feature.snippets[0::2][:SHOWN]))
    tested = feature.snippets[1::2][:PAIRS]
    others = draw.sample(silent, min(len(tested), len(silent)))
    accuracy, bias = detection(
        namer, name, [one.before + one.token + one.after for one in tested], others
    )
    return Label(name, accuracy, min(len(tested), len(others)), bias, by)


def detection(
    namer: Namer, name: str, fitting: Sequence[str], others: Sequence[str]
) -> tuple[float, float]:
    """(share of pairs in which the fitting text is picked, preference for the first shown).

    A pair is asked in both orders and decided by their mean; a tie, or nothing readable, is half.
    """
    pairs = list(zip(fitting, others, strict=False))
    orders = [(a, b) for a, b in pairs] + [(b, a) for a, b in pairs]
    replies = np.array(
        namer.compare([SnippetPair("", _line(a), _line(b), name) for a, b in orders]), float
    )
    bias = float(np.nanmean(replies)) if np.isfinite(replies).any() else 0.0
    forward, backward = np.nan_to_num(replies).reshape(2, -1)
    wins = (np.sign(forward - backward) + 1) / 2
    return float(wins.mean()), bias


def _line(text: str) -> str:
    return " ".join(text.split())


def _clean(reply: str) -> str:
    """The reply as a name that steering text can hold."""
    line = next((line for line in reply.splitlines() if line.strip()), "")
    name = re.sub(r'[",@:/«»*`]|^\W+|\W+$', " ", line)
    return " ".join(name.split())[:LONGEST].strip() or "unnamed"
