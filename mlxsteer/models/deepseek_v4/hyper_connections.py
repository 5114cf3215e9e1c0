"""Hyper-connections: four residual streams, read through gates and mixed by a 4x4 matrix.

Spec C.1 to C.3. The mixing matrix is made column-stochastic by Sinkhorn steps, which is why a
vector added to all four streams is carried unchanged through every later layer. All float32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsteer.models.deepseek_v4 import hyper_kernels, kernels
from mlxsteer.models.deepseek_v4.config import ModelArgs
from mlxsteer.models.deepseek_v4.fusing import Switch, fused
from mlxsteer.models.deepseek_v4.host import library, on_host, sigmoid, softmax


def sinkhorn(C: Any, iterations: int, eps: float) -> Any:
    """`C` [..., source, destination] with columns, rows, ..., columns normalised in turn.

    Sums come from products with a constant matrix, and eps from a column of ones: two
    operations per step, for any number of tokens at once.
    """
    lib, n = library(C), C.shape[-1]
    rows, columns = _sums(lib, n, eps)
    flat = C.reshape(-1, n * n)
    flat = lib.concatenate([flat, lib.ones((flat.shape[0], 1), dtype=flat.dtype)], axis=-1)
    spare = lib.zeros_like(flat)
    for sums in [columns] + [rows, columns] * (iterations - 1):
        flat = _divided(flat, sums, spare)
    return flat[:, :-1].reshape(C.shape)


def _divided(flat: Any, sums: Any, spare: Any) -> Any:
    """`flat / (flat @ sums)`; NumPy writes over `flat` and `spare`, which halves its time."""
    if isinstance(flat, mx.array):
        return flat / (flat @ sums)
    return np.divide(flat, flat.dot(sums, spare), flat)


@lru_cache(maxsize=4)
def _sums(lib: Any, n: int, eps: float) -> tuple[Any, Any]:
    """[n*n+1, n*n+1] matrices: a row's (a column's) sum plus eps in each of its places.

    The last place holds 1 and keeps it.
    """
    index = np.arange(n * n)
    found = []
    for group in (index // n, index % n):
        sums = np.zeros((n * n + 1, n * n + 1))
        sums[:-1, :-1] = group[:, None] == group
        sums[-1, :-1], sums[-1, -1] = eps, 1
        found.append(mx.array(sums) if lib is mx else sums)
    return found[0], found[1]


@on_host(np.float64)
def gates(
    u: Any, squares: Any, scale: Any, base: Any, n: int, constants: tuple[int, float, float]
) -> tuple[Any, Any, Any]:
    """What a sublayer reads, writes and mixes: pre [..., n], post [..., n], C [..., n, n].

    u [..., n*(n+2)]: the projection of the flattened streams; squares [..., 1]: the mean of
    their squares. `constants`: Sinkhorn iterations, hc_eps, norm eps.
    """
    iterations, eps, norm_eps = constants
    lib = library(u)
    u = u / lib.sqrt(squares + norm_eps) * scale[_parts(lib, n)] + base
    weights = sigmoid(u[..., : 2 * n])
    C = softmax(u[..., 2 * n :].reshape(*u.shape[:-1], n, n)) + eps
    return weights[..., :n] + eps, 2 * weights[..., n:], sinkhorn(C, iterations, eps)


@lru_cache(maxsize=4)
def _parts(lib: Any, n: int) -> Any:
    """Which of the three scales each of a projection's n*(n+2) numbers has."""
    return lib.array([0] * n + [1] * n + [2] * n * n)


def mean_square(z: mx.array) -> mx.array:
    """Over the last axis: z [..., W] -> [..., 1]."""
    return (z[..., None, :] @ z[..., None]).squeeze(-1) / z.shape[-1]


def collapse(weights: mx.array, X: mx.array) -> mx.array:
    """The weighted sum of streams. weights [B, T, n], X [B, T, n, D] -> [B, T, D]."""
    return (weights[..., None, :] @ X).squeeze(-2)


def expand(
    out: mx.array, X: mx.array, post: mx.array, C: mx.array, dtype: mx.Dtype = mx.float32
) -> mx.array:
    """hc_post: `Y_k = post_k out + sum_j C[j,k] X_j`. out [B, T, D] -> [B, T, n, D].

    The sum is float32, cast to `dtype` at the end. One token is one group where groups are
    compiled; otherwise a matrix product.
    """
    if X.shape[1] == 1 and Switch.compiling:
        sources = [a for j in range(X.shape[2]) for a in (C[:, :, j], X[:, :, j : j + 1])]
        return _expand_step(dtype, out, post, *sources)
    written = post[..., None] * out.astype(mx.float32)[..., None, :]
    return mx.addmm(written, C.swapaxes(-1, -2), X.astype(mx.float32)).astype(dtype)


@fused
def _expand_step(dtype: mx.Dtype, out: mx.array, post: mx.array, *sources: mx.array) -> mx.array:
    """`expand` for one token: `sources` are row j of C [B, 1, n] and X_j [B, 1, 1, D] in turn."""
    Y = post[..., None] * out.astype(mx.float32)[..., None, :]
    for row, X in zip(sources[::2], sources[1::2], strict=True):
        Y = Y + row[..., None] * X.astype(mx.float32)
    return Y.astype(dtype)


def _sample() -> tuple[Any, ...]:
    X = mx.random.normal((1, 1, 4, 64), key=mx.random.key(1))
    fn = mx.random.normal((24, 256), key=mx.random.key(2)) / 16
    scale, base = mx.array([1.0, 0.5, 2.0]), mx.random.normal((24,), key=mx.random.key(3))
    return X, fn, scale, base, mx.float32, (20, 1e-6, 1e-6)


@kernels.twin(hyper_kernels.hyper_front, _sample)
def front(
    X: mx.array,
    fn: mx.array,
    scale: mx.array,
    base: mx.array,
    dtype: mx.Dtype,
    constants: tuple[int, float, float],
) -> tuple[mx.array, mx.array, mx.array]:
    """hc_pre: X [B, T, n, D] -> the sublayer's input [B, T, D], post [B, T, n], C [B, T, n, n].

    `constants`: Sinkhorn iterations, hc_eps, norm eps.
    """
    X32 = X.astype(mx.float32)
    z = mx.flatten(X32, -2, -1)
    pre, post, C = gates(z @ fn.T, mean_square(z), scale, base, X.shape[2], constants)
    return collapse(pre, X32).astype(dtype), post, C


class HyperConnection(nn.Module):
    """The front of one sublayer: what it reads, how its output is spread, how streams mix."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        n, D = args.hc_mult, args.hidden_size
        self.fn = mx.zeros((n * (n + 2), n * D))
        self.base = mx.zeros((n * (n + 2),))
        self.scale = mx.ones((3,))
        self.constants = (args.hc_sinkhorn_iters, args.hc_eps, args.rms_norm_eps)

    def __call__(
        self, X: mx.array, dtype: mx.Dtype | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """X [B, T, n, D] -> the sublayer's input [B, T, D] in `dtype` (or X's), post, C."""
        return front(X, self.fn, self.scale, self.base, dtype or X.dtype, self.constants)


class HyperHead(nn.Module):
    """The four streams collapsed to one before the final norm (spec C.3)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        n, D = args.hc_mult, args.hidden_size
        self.fn = mx.zeros((n, n * D))
        self.base = mx.zeros((n,))
        self.scale = mx.ones((1,))
        self._norm_eps, self._eps = args.rms_norm_eps, args.hc_eps

    def __call__(self, X: mx.array) -> mx.array:
        """X [B, T, n, D] -> [B, T, D] in X's dtype."""
        X32 = X.astype(mx.float32)
        z = mx.flatten(X32, -2, -1)
        u = z @ self.fn.T * mx.rsqrt(mean_square(z) + self._norm_eps)
        w = mx.sigmoid(u * self.scale[0] + self.base) + self._eps
        return collapse(w, X32).astype(X.dtype)
