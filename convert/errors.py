"""What can go wrong in a conversion that the user can mend."""

from __future__ import annotations

from collections.abc import Sequence

from mlxsteer.errors import MlxsteerError


class ConvertError(MlxsteerError):
    """A checkpoint cannot be read, planned, written or verified."""


def some(names: Sequence[str], limit: int = 3) -> str:
    """`"a, b, c and 4 more"`: enough names to find the fault, never a screenful."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit:,} more"
