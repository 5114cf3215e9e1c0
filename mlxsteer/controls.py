"""What a vector is measured against: directions that mean nothing, and other steerings of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlxsteer.vector import SteeringVector


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """`vector` turned by one random rotation of the space, the same at every layer.

    So all that strength means stays (lengths, layers, δ*, the cosines between the directions of
    different layers) and only what it points at is lost. Independent directions per layer would
    be a weaker rival: their shifts add up like noise, those of a real vector do not.
    """
    layers = vector.layers
    rows = [np.atleast_2d(vector.directions[layer]).astype(np.float64) for layer in layers]
    sizes = [len(part) for part in rows]
    stacked = np.concatenate(rows)
    left, scale, right = np.linalg.svd(stacked, full_matrices=False)
    noise = np.random.default_rng(seed).normal(size=right.shape)
    basis, _ = np.linalg.qr(noise.T)
    turned = (left * scale) @ basis.T
    parts = np.split(turned, np.cumsum(sizes)[:-1])
    directions = {
        layer: part.reshape(vector.directions[layer].shape).astype(np.float32)
        for layer, part in zip(layers, parts, strict=True)
    }
    return replace(vector, directions=directions, name=f"random-{seed}")
