"""Makes a model fit to change threads.

MLX's streams belong to the thread that made them, and an array that was not computed yet can be
computed only there. Weights read lazily and tables that a module keeps for itself are such.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

OURS = ("mlx", "mlx_lm", "mlxsteer")


def settle(network: nn.Module) -> None:
    """Compute every array that `network` holds, in this thread: parameters and private tables."""
    mx.eval(list(_arrays(network, set())))


def _arrays(thing: Any, seen: set[int]) -> Iterator[mx.array]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, mx.array):
        yield thing
        return
    parts: list[Any] = []
    if isinstance(thing, dict):
        parts += thing.values()
    elif isinstance(thing, list | tuple):
        parts += thing
    if type(thing).__module__.split(".")[0] in OURS:
        parts += getattr(thing, "__dict__", {}).values()
        parts += [getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ())]
    for part in parts:
        yield from _arrays(part, seen)
