"""States made of known sparse features, as a buffer on disk."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxsteer.sae.activations import Activations

TRUE, WIDTH, ACTIVE = 40, 32, 3


def directions(seed: int = 0) -> np.ndarray:
    """float32 [40, 32] unit rows: more features than dimensions."""
    rows = np.random.default_rng(seed).normal(size=(TRUE, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def buffer(path: Path, rows: int = 20_000, held: int = 1000, seed: int = 0) -> Activations:
    """States that are a constant and 3 of the 40 features, each at 1 to 2, as bfloat16."""
    rng = np.random.default_rng(seed + 1)
    strengths = np.zeros((rows, TRUE), np.float32)
    which = np.argsort(rng.random((rows, TRUE)), axis=1)[:, :ACTIVE]
    np.put_along_axis(strengths, which, rng.uniform(1, 2, (rows, ACTIVE)), axis=1)
    states = mx.array(7 * (strengths @ directions(seed) + 0.5))
    path.write_bytes(np.array(states.astype(mx.bfloat16).view(mx.uint16)).tobytes())
    return Activations(path, WIDTH, rows - held, rows)


def recovered(decoder: np.ndarray, seed: int = 0) -> float:
    """Mean over the true features of the best cosine among the decoder's rows."""
    rows = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    return float((directions(seed) @ rows.T).max(axis=1).mean())
