"""What training minimises: reconstruction error, dead features' share of it, and sparsity.

Pure functions of parameters and states; states are scaled so that their mean norm is √D. The
parameters: W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D], and for jumprelu log_threshold [F].

Sources: TopK and the auxiliary loss, Gao et al. 2024 ("Scaling and evaluating sparse
autoencoders", sections 2.3 and A.2); BatchTopK, Bussmann et al. 2024 ("BatchTopK Sparse
Autoencoders", section 3); JumpReLU's pseudo-derivatives, Rajamanoharan et al. 2024 ("Jumping
Ahead", section 3, equations 11 and 12).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

TRAINABLE = ("batchtopk", "topk", "jumprelu")
AUXILIARY = 1 / 32  # weight of the dead features' loss (Gao et al., A.2)
SPARSITY = 1.0  # weight of jumprelu's (L0/k - 1)²
BANDWIDTH = 0.2  # of jumprelu's pseudo-derivatives, as a share of the threshold

Params = dict[str, mx.array]


class Step(NamedTuple):
    """One batch: loss, squared error per state, features per state, which features fired [F]."""

    loss: mx.array
    error: mx.array
    l0: mx.array
    fired: mx.array


def initial(features: int, x: mx.array, k: int, architecture: str, key: mx.array) -> Params:
    """Decoder rows at random on the unit sphere, the encoder their transpose, b_dec the mean.

    x: [n, D] scaled states. A jumprelu starts at the threshold that lets k features a state
    through, because pseudo-derivatives are felt only near the threshold.
    """
    width = x.shape[1]
    decoder = mx.random.normal((features, width), key=key)
    decoder = unit_rows(decoder)
    params = {
        "W_enc": mx.contiguous(decoder.T),
        "b_enc": mx.zeros((features,)),
        "W_dec": decoder,
        "b_dec": x.mean(axis=0),
    }
    if architecture == "jumprelu":
        threshold = _batch_threshold(pre_activations(params, x), k)
        params["log_threshold"] = mx.full((features,), mx.log(threshold))
    mx.eval(params)
    return params


def pre_activations(params: Params, x: mx.array) -> mx.array:
    """[n, F]: (x - b_dec) W_enc + b_enc, written so that no gradient of x is computed."""
    bias = params["b_enc"] - params["b_dec"] @ params["W_enc"]
    return x @ params["W_enc"] + bias


def activate(params: Params, pre: mx.array, architecture: str, k: int) -> mx.array:
    """[n, F] activations in training, with the gradients that the architecture prescribes."""
    if architecture == "jumprelu":
        return _jump(pre, mx.exp(params["log_threshold"]))
    if architecture == "topk":
        edge = mx.partition(pre, pre.shape[1] - k, axis=-1)[:, pre.shape[1] - k, None]
    else:
        edge = _batch_threshold(pre, k)
    return mx.maximum(pre, 0) * mx.stop_gradient(pre >= edge)


def loss(
    params: Params, x: mx.array, dead: mx.array | None, architecture: str, k: int, variance: float
) -> Step:
    """The loss of scaled states x [n, D], relative to their `variance` (mean ‖x - mean‖²).

    dead: indices [m] of dead features, or None. Twice the states' width of them, at most half,
    reconstruct what the living leave over.
    """
    pre = pre_activations(params, x)
    acts = activate(params, pre, architecture, k)
    residual = x - (acts @ params["W_dec"] + params["b_dec"])
    error = (residual * residual).sum(axis=-1).mean()
    total = error / variance
    if dead is not None:
        total = total + _auxiliary(params, pre, mx.stop_gradient(residual), dead) / variance
    if architecture == "jumprelu":
        total = total + SPARSITY * _sparsity(params, pre, k)
    firing = mx.stop_gradient(acts > 0)
    l0 = firing.sum(axis=-1).mean()
    return Step(total, mx.stop_gradient(error), l0, firing.any(axis=0))


def without_growth(grads: Params, params: Params) -> Params:
    """Gradients whose part along each decoder row is removed: it would only change lengths."""
    rows, along = params["W_dec"], grads["W_dec"]
    along = along - (along * rows).sum(axis=-1, keepdims=True) * rows
    return {**grads, "W_dec": along}


def unit_rows(matrix: mx.array) -> mx.array:
    """The matrix with rows of length 1."""
    return matrix / mx.maximum(mx.linalg.norm(matrix, axis=-1, keepdims=True), 1e-12)


def inference_threshold(params: Params, batches: list[mx.array], k: int) -> float:
    """BatchTopK's threshold for single states: the mean of the batches' smallest activations
    that were kept (Bussmann et al., equation 5)."""
    edges = [_batch_threshold(pre_activations(params, x), k) for x in batches]
    return float(mx.stack(edges).mean())


def _batch_threshold(pre: mx.array, k: int) -> mx.array:
    """The smallest of the batch's k·n largest pre-activations, at least a hair above 0."""
    flat = pre.reshape(-1)
    at = flat.size - k * pre.shape[0]
    return mx.maximum(mx.partition(mx.stop_gradient(flat), at)[at], 1e-6)


def _auxiliary(params: Params, pre: mx.array, residual: mx.array, dead: mx.array) -> mx.array:
    """Squared error of the dead features' best reconstruction of the residual."""
    chosen = pre[:, dead]
    count = dead.size
    most = residual.shape[1] // 2
    if count > most:
        edge = mx.partition(mx.stop_gradient(chosen), count - most, axis=-1)
        chosen = chosen * mx.stop_gradient(chosen >= edge[:, count - most, None])
    difference = residual - mx.maximum(chosen, 0) @ params["W_dec"][dead]
    share = min(1.0, count / most)
    return AUXILIARY * share * (difference * difference).sum(axis=-1).mean()


def _near(pre: mx.array, threshold: mx.array) -> mx.array:
    """[n, F]: the rectangle kernel over its width, 1/ε within ε/2 of the threshold."""
    width = BANDWIDTH * threshold
    return mx.stop_gradient((mx.abs(pre - threshold) < width / 2) / width)


def _pull(threshold: mx.array, slope: mx.array) -> mx.array:
    """0, with gradient `slope` with respect to the threshold."""
    return mx.stop_gradient(slope) * (threshold - mx.stop_gradient(threshold))


def _jump(pre: mx.array, threshold: mx.array) -> mx.array:
    passing = mx.stop_gradient(pre > threshold)
    return pre * passing + _pull(threshold, -threshold * _near(pre, threshold))


def _sparsity(params: Params, pre: mx.array, k: int) -> mx.array:
    """(L0/k - 1)², so that k features a state is where the penalty rests."""
    threshold = mx.exp(params["log_threshold"])
    step = mx.stop_gradient(pre > threshold) + _pull(threshold, -_near(pre, threshold))
    l0 = step.sum(axis=-1).mean()
    return mx.square(l0 / k - 1)


def folded(params: Params, scale: float, threshold: float | None) -> Mapping[str, mx.array]:
    """The weights for states as they are, in place of states multiplied by `scale`.

    Decoder rows stay of length 1, so an activation is a length in the model's own units.
    """
    found = {
        "W_enc": params["W_enc"],
        "W_dec": params["W_dec"],
        "b_enc": params["b_enc"] / scale,
        "b_dec": params["b_dec"] / scale,
    }
    if "log_threshold" in params:
        found["threshold"] = mx.exp(params["log_threshold"]) / scale
    elif threshold is not None:
        found["threshold"] = mx.full(params["b_enc"].shape, threshold / scale)
    return found
