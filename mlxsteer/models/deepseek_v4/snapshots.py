"""Going back to where a prompt cache stood, for rollback and for prefixes that are used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxsteer.errors import ModelError
from mlxsteer.models.deepseek_v4.cache import DeepseekV4Cache


@dataclass(frozen=True)
class Snapshot:
    """The state of a whole cache at one moment."""

    layers: tuple[DeepseekV4Cache, ...]


def snapshot(cache: Sequence[DeepseekV4Cache]) -> Snapshot:
    """Remember where `cache` stands. Copies no array: MLX copies when one is next written."""
    return Snapshot(tuple(c.copied() for c in cache))


def restore(cache: Sequence[DeepseekV4Cache], snap: Snapshot) -> None:
    """Put `cache` back, in place, to where it stood. A snapshot can be restored many times."""
    if len(cache) != len(snap.layers):
        raise ModelError(
            f"The snapshot has {len(snap.layers)} layers and the cache {len(cache)}: they belong"
            " to different models."
        )
    for live, kept in zip(cache, snap.layers, strict=True):
        live.__dict__.update(kept.copied().__dict__)
