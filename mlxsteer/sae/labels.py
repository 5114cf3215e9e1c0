"""Names of features: a small file beside the dictionary, written by `sae label`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mlxsteer.errors import SaeError
from mlxsteer.files import write_text

LABELS = "labels.json"


@dataclass(frozen=True)
class Label:
    """A feature's name and what a detection test says of it.

    accuracy: share of held-out pairs in which the namer picked, by the name alone, the snippet
    that the feature fires on; 0.5 is chance. bias: its preference for the snippet shown first,
    -1..1. by: who named it.
    """

    text: str
    accuracy: float
    pairs: int
    bias: float
    by: str


def labels_of(path: Path) -> dict[int, Label]:
    """{feature: label} of the dictionary at `path`; empty when nothing was labelled."""
    file = path / LABELS
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {int(index): Label(**facts) for index, facts in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SaeError(f"{file} is damaged ({error}). Remove it and label again.") from None


def keep(path: Path, labels: Mapping[int, Label]) -> None:
    """Add `labels` to those that are there."""
    merged = labels_of(path) | dict(labels)
    facts = {str(index): asdict(merged[index]) for index in sorted(merged)}
    write_text(path / LABELS, json.dumps(facts, ensure_ascii=False, indent=1))
