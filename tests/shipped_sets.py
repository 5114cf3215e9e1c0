"""The contrast sets that ship: their names, and each of them, read once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from mlxsteer.contrast import (
    ContrastSet,
)

SHIPPED = sorted(
    path.stem
    for path in (Path(__file__).parent.parent / "prompts").glob("*.yaml")
    if not path.name.startswith("_")
)


@cache
def shipped(name: str) -> ContrastSet:
    """The set of that name, read once."""
    return ContrastSet.load(name)
