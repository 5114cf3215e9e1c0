"""The kernels of the hyper-connection front: projections of the streams, and all that follows."""

from __future__ import annotations

import mlx.core as mx

from mlxsteer.models.deepseek_v4 import kernels
from mlxsteer.models.deepseek_v4.kernels import Body

LANES = 32  # partial sums per projected value; neighbouring threads read neighbouring weights
STEP_TOKENS = 8  # up to this many tokens the projection is a kernel too, beyond it a product

# Partial sums of fn . z and z . z for every token, lane by lane.
# X [N, W] T; fn [M, W] float -> partial [N, M + 1, LANES] float
PARTIALS = Body(
    "hyper_partials",
    ("X", "fn"),
    ("partial",),
    """
    uint lane = thread_position_in_grid.x;
    uint j = thread_position_in_grid.y;
    uint t = thread_position_in_grid.z;
    float sum = 0.0f;
    for (uint i = lane; i < W; i += LANES) {
        float z = float(X[t * W + i]);
        sum += z * (j < M ? float(fn[j * W + i]) : z);
    }
    partial[(t * (M + 1) + j) * LANES + lane] = sum;
""",
)

# The front of a sublayer from those sums: norm, gates, Sinkhorn, weighted sum of streams.
# partial [N, M + 1, P]; X [N, S, D] T; scale [3]; base [M]
# -> x [N, D] O; post [N, S] float; C [N, S, S] float
FRONT = Body(
    "hyper_front",
    ("partial", "X", "scale", "base"),
    ("x", "post", "C"),
    """
    uint d = thread_position_in_grid.x;
    uint t = thread_position_in_grid.y;
    float u[M + 1];
    for (uint j = 0; j <= M; ++j) {
        u[j] = 0.0f;
        for (uint p = 0; p < P; ++p) {
            u[j] += partial[(t * (M + 1) + j) * P + p];
        }
    }
    float r = 1.0f / metal::sqrt(u[M] / float(S * D) + NORM_EPS);
    float sum = 0.0f;
    for (uint k = 0; k < S; ++k) {
        float gate = 1.0f / (1.0f + metal::exp(-(u[k] * r * scale[0] + base[k]))) + HC_EPS;
        sum += gate * float(X[(t * S + k) * D + d]);
    }
    x[t * D + d] = O(sum);
    if (d < S) {
        float gate = u[S + d] * r * scale[1] + base[S + d];
        post[t * S + d] = 2.0f / (1.0f + metal::exp(-gate));
    }
    if (d == 0) {
        float c[S * S];
        for (uint j = 0; j < S; ++j) {
            float top = -INFINITY;
            for (uint k = 0; k < S; ++k) {
                uint i = 2 * S + j * S + k;
                c[j * S + k] = u[i] * r * scale[2] + base[i];
                top = metal::max(top, c[j * S + k]);
            }
            float total = 0.0f;
            for (uint k = 0; k < S; ++k) {
                c[j * S + k] = metal::exp(c[j * S + k] - top);
                total += c[j * S + k];
            }
            for (uint k = 0; k < S; ++k) {
                c[j * S + k] = c[j * S + k] / total + HC_EPS;
            }
        }
        for (uint n = 0; n < 2 * ITERATIONS - 1; ++n) {
            uint along = n % 2 == 0 ? S : 1;
            uint across = n % 2 == 0 ? 1 : S;
            for (uint a = 0; a < S; ++a) {
                float total = HC_EPS;
                for (uint b = 0; b < S; ++b) {
                    total += c[a * across + b * along];
                }
                for (uint b = 0; b < S; ++b) {
                    c[a * across + b * along] /= total;
                }
            }
        }
        for (uint i = 0; i < S * S; ++i) {
            C[t * S * S + i] = c[i];
        }
    }
""",
)


def hyper_front(
    X: mx.array,
    fn: mx.array,
    scale: mx.array,
    base: mx.array,
    dtype: mx.Dtype,
    constants: tuple[int, float, float],
) -> tuple[mx.array, mx.array, mx.array]:
    """`hyper_connections.front`: two launches for few tokens, a product and one for many."""
    B, T, S, D = X.shape
    N, M = B * T, fn.shape[0]
    iterations, eps, norm_eps = constants
    partial = _partials(X, fn) if N <= STEP_TOKENS else _products(X, fn)
    sizes = {"S": S, "D": D, "M": M, "P": partial.shape[-1], "ITERATIONS": iterations}
    x, post, C = kernels.launch(
        FRONT,
        [partial, X, scale, base],
        {"O": dtype, **sizes},
        (D, N, 1),
        [((B, T, D), dtype), ((B, T, S), mx.float32), ((B, T, S, S), mx.float32)],
        (("HC_EPS", eps), ("NORM_EPS", norm_eps)),
    )
    return x, post, C


def _partials(X: mx.array, fn: mx.array) -> mx.array:
    """[N, M + 1, LANES] by the kernel."""
    N, (M, W) = X.shape[0] * X.shape[1], fn.shape
    sizes = {"W": W, "M": M, "LANES": LANES}
    shape = (N, M + 1, LANES)
    return kernels.launch(PARTIALS, [X, fn], sizes, (LANES, M + 1, N), [(shape, mx.float32)])[0]


def _products(X: mx.array, fn: mx.array) -> mx.array:
    """[N, M + 1, 1] by a matrix product."""
    z = X.reshape(-1, fn.shape[1]).astype(mx.float32)
    squares = mx.square(z).sum(axis=-1, keepdims=True)
    return mx.concatenate([z @ fn.T, squares], axis=-1)[..., None]
