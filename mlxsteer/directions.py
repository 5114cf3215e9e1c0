"""From paired states to a direction, and what can be said of it without steering. Numpy alone.

`positive` and `negative` are float32 [N, D], row i of each from pair i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mlxsteer.errors import VectorError

Array = np.ndarray
NOISE = 1e-5  # of a state's length: about what float32 leaves of two states that are the same


@dataclass(frozen=True)
class LayerReport:
    """What a layer's direction looks like; none of this proves that it steers.

    norm_ratio: ‖mean difference‖ / median residual norm. auroc: of the projection, on pairs
    that the direction was not fitted to. agreement: share of such pairs whose difference points
    along it. Both None for a single pair, which leaves nothing to judge on.
    """

    layer: int
    norm_ratio: float
    auroc: float | None
    agreement: float | None


def mean_difference(positive: Array, negative: Array) -> Array:
    """mean(positive − negative)."""
    return (positive - negative).mean(axis=0)


def principal(positive: Array, negative: Array) -> Array:
    """First right singular vector of the *uncentred* differences, in the mean's direction.

    Centring would remove the mean difference itself: on the demo model that leaves cosine −0.05
    to 0.77 with it, and weaker steering.
    """
    differences = positive - negative
    _, _, rows = np.linalg.svd(differences, full_matrices=False)
    mean = differences.mean(axis=0)
    sign = 1.0 if rows[0] @ mean >= 0 else -1.0
    return sign * rows[0] * np.linalg.norm(mean)


def logistic(positive: Array, negative: Array, ridge: float = 1.0, steps: int = 25) -> Array:
    """Weights of a ridge-regularised logistic probe, scaled to the mean difference's length.

    Minimises Σ log(1 + exp(−y w·x)) + ridge/2 ‖w‖² over w; y = ±1, x the states, centred and
    scaled to unit average norm; no intercept. Newton's method in the span of the samples, which
    is where the optimum lies (representer theorem).
    """
    states = np.concatenate([positive, negative]).astype(np.float64)
    states = states - states.mean(axis=0)
    states /= np.linalg.norm(states, axis=1).mean() or 1.0
    labels = np.repeat([1.0, 0.0], len(positive))
    kernel = states @ states.T
    weights = np.zeros(len(states))
    for _ in range(steps):
        probability = 1 / (1 + np.exp(-kernel @ weights))
        curvature = np.maximum(probability * (1 - probability), 1e-9)
        target = kernel @ weights + (labels - probability) / curvature
        weights = np.linalg.solve(kernel + ridge * np.diag(1 / curvature), target)
    direction = weights @ states
    length = np.linalg.norm(mean_difference(positive, negative))
    return (direction / (np.linalg.norm(direction) or 1.0) * length).astype(np.float32)


def whitened(positive: Array, negative: Array, shrinkage: float = 0.5) -> Array:
    """Σ⁻¹(mean difference), Σ the pooled within-class covariance shrunk to a sphere.

    Linear discriminant analysis with shrinkage; scaled to the mean difference's length. Inverts
    in the samples' span (Woodbury), so D may be much larger than N.
    """
    difference = mean_difference(positive, negative).astype(np.float64)
    spread = np.concatenate([positive - positive.mean(axis=0), negative - negative.mean(axis=0)])
    spread = spread.astype(np.float64) / np.sqrt(len(spread))
    sphere = shrinkage * float((spread * spread).sum()) / spread.shape[1] or 1.0
    scaled = np.sqrt(1 - shrinkage) * spread
    inner = sphere * np.eye(len(scaled)) + scaled @ scaled.T
    direction = (difference - scaled.T @ np.linalg.solve(inner, scaled @ difference)) / sphere
    length = np.linalg.norm(difference) / (np.linalg.norm(direction) or 1.0)
    return (direction * length).astype(np.float32)


METHODS: Mapping[str, Callable[[Array, Array], Array]] = {
    "mean": mean_difference,
    "pca": principal,
    "logistic": logistic,
    "whitened": whitened,
}


def fit(positive: Array, negative: Array, method: str, orthogonalise: bool = False) -> Array:
    """The direction [D] of `method`; orthogonalised: without its part along the negatives' mean."""
    direction = METHODS[method](positive, negative)
    return without(direction, negative.mean(axis=0)) if orthogonalise else direction


def without(direction: Array, control_mean: Array) -> Array:
    """`direction` without its component along `control_mean`."""
    unit = control_mean / (np.linalg.norm(control_mean) or 1.0)
    return direction - (direction @ unit) * unit


def report(
    layer: int,
    positive: Array,
    negative: Array,
    residual_norm: float,
    method: str = "mean",
    orthogonalise: bool = False,
) -> LayerReport:
    """Two-fold cross-validation over pairs: fit on one half, judge on the other."""
    norm_ratio = float(np.linalg.norm(mean_difference(positive, negative))) / residual_norm
    if len(positive) < 2:
        return LayerReport(layer, norm_ratio, None, None)
    scores: list[tuple[Array, Array]] = []
    for fold in (0, 1):
        seen = np.arange(len(positive)) % 2 == fold
        direction = fit(positive[seen], negative[seen], method, orthogonalise)
        scores.append((positive[~seen] @ direction, negative[~seen] @ direction))
    return LayerReport(
        layer=layer,
        norm_ratio=norm_ratio,
        auroc=float(np.mean([auroc(up, down) for up, down in scores])),
        agreement=float(np.mean(np.concatenate([up > down for up, down in scores]))),
    )


def auroc(up: Array, down: Array) -> float:
    """P(up > down) over all cross pairs, ties counting half (Mann-Whitney U)."""
    above = (up[:, None] > down[None]).mean()
    return float(above + 0.5 * (up[:, None] == down[None]).mean())


def require_nonzero(direction: Array, states: Array, name: str, layer: int) -> None:
    """VectorError when the poles left no difference beyond the rounding of `states` [N, D]."""
    noise = NOISE * float(np.linalg.norm(states, axis=1).mean())
    if not np.isfinite(direction).all():
        raise VectorError(
            f"{name}: the model gives no finite states at layer {layer}. Load it with --dtype"
            " float32, or check it with `mlxsteer doctor`."
        )
    if float(np.linalg.norm(direction)) <= noise:
        raise VectorError(
            f"{name}: the two poles give the same states at layer {layer}, so there is no"
            " direction. Make the wordings differ, or read at another position."
        )
