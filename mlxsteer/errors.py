"""The one error hierarchy. A message says what is wrong, why, and what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MlxsteerError(Exception):
    """Something the user can mend. The CLI prints the message alone and exits 1."""


class UsageError(MlxsteerError):
    """The words typed are off (grammar, option, range). The CLI exits 2."""


class VectorError(MlxsteerError):
    """A vector file or its contents cannot be used."""


class ModelError(MlxsteerError):
    """A model cannot be found, loaded or steered."""


class ContrastError(MlxsteerError):
    """A contrast set is malformed."""


class SaeError(MlxsteerError):
    """A sparse autoencoder cannot be read, trained or used."""


class ContextLengthError(MlxsteerError):
    """A prompt is longer than the model's context."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'terse'?"`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
