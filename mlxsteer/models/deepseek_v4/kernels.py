"""Metal kernels, each a twin of a plain definition elsewhere. Not yet run on Metal.

A kernel's body touches no shared memory and needs no barrier, so it also compiles as C++, and
tests run it so against its definition. On Metal it is compared with the definition when first
used; if it fails or differs, a warning is given once and the definition runs instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

from mlxsteer.models.deepseek_v4.config import ModelArgs

LANES = 32  # partial sums per projected value; neighbouring threads read neighbouring weights
STEP_TOKENS = 8  # up to this many tokens the projection is a kernel too, beyond it a product
CLOSE = 1e-3

# Partial sums of fn . z and z . z for every token, lane by lane.
# X [N, W] T; fn [M, W] float -> partial [N, M + 1, LANES] float
PARTIALS = """
    uint lane = thread_position_in_grid.x;
    uint j = thread_position_in_grid.y;
    uint t = thread_position_in_grid.z;
    float sum = 0.0f;
    for (uint i = lane; i < W; i += LANES) {
        float z = float(X[t * W + i]);
        sum += z * (j < M ? float(fn[j * W + i]) : z);
    }
    partial[(t * (M + 1) + j) * LANES + lane] = sum;
"""

# The front of a sublayer from those sums: norm, gates, Sinkhorn, weighted sum of streams.
# partial [N, M + 1, P]; X [N, S, D] T; scale [3]; base [M]
# -> x [N, D] O; post [N, S] float; C [N, S, S] float
FRONT = """
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
"""

Front = Callable[
    [mx.array, mx.array, mx.array, mx.array, mx.Dtype], tuple[mx.array, mx.array, mx.array]
]


@dataclass(frozen=True)
class FrontSizes:
    """What the two kernels are compiled for."""

    streams: int
    hidden: int
    iterations: int
    eps: float
    norm_eps: float

    @property
    def projected(self) -> int:
        return self.streams * (self.streams + 2)

    @property
    def header(self) -> str:
        """The real-valued constants; MLX templates take integers only."""
        return f"#define HC_EPS {self.eps!r}f\n#define NORM_EPS {self.norm_eps!r}f\n"


def front(args: ModelArgs, plain: Front) -> Front:
    """The hyper-connection front for this machine: the kernels on Metal, else `plain`."""
    if not mx.metal.is_available():
        return plain
    sizes = FrontSizes(
        args.hc_mult, args.hidden_size, args.hc_sinkhorn_iters, args.hc_eps, args.rms_norm_eps
    )

    def run(X: mx.array, fn: mx.array, scale: mx.array, base: mx.array, dtype: mx.Dtype) -> Any:
        if sizes not in _verdicts:
            _verdicts[sizes] = _agrees(sizes, plain)
        if not _verdicts[sizes]:
            return plain(X, fn, scale, base, dtype)
        return front_kernel(X, fn, scale, base, dtype, sizes)

    return run


_verdicts: dict[FrontSizes, bool] = {}  # whether the kernels agreed, per sizes


def front_kernel(
    X: mx.array,
    fn: mx.array,
    scale: mx.array,
    base: mx.array,
    dtype: mx.Dtype,
    sizes: FrontSizes,
) -> tuple[mx.array, mx.array, mx.array]:
    """`HyperConnection.plain` in two launches for few tokens; four for many."""
    B, T, S, D = X.shape
    N, M = B * T, sizes.projected
    partial = _partials(X, fn) if N <= STEP_TOKENS else _products(X, fn)
    x, post, C = _front_kernel(sizes)(
        inputs=[partial, X, scale, base],
        template=[
            ("O", dtype),
            ("S", S),
            ("D", D),
            ("M", M),
            ("P", partial.shape[-1]),
            ("ITERATIONS", sizes.iterations),
        ],
        grid=(D, N, 1),
        threadgroup=(min(D, 256), 1, 1),
        output_shapes=[(B, T, D), (B, T, S), (B, T, S, S)],
        output_dtypes=[dtype, mx.float32, mx.float32],
    )
    return x, post, C


def _partials(X: mx.array, fn: mx.array) -> mx.array:
    """[N, M + 1, LANES] by the kernel."""
    N, (M, W) = X.shape[0] * X.shape[1], fn.shape
    return _partials_kernel()(
        inputs=[X, fn],
        template=[("W", W), ("M", M), ("LANES", LANES)],
        grid=(LANES, M + 1, N),
        threadgroup=(LANES, 1, 1),
        output_shapes=[(N, M + 1, LANES)],
        output_dtypes=[mx.float32],
    )[0]


def _products(X: mx.array, fn: mx.array) -> mx.array:
    """[N, M + 1, 1] by a matrix product."""
    z = X.reshape(-1, fn.shape[1]).astype(mx.float32)
    squares = mx.square(z).sum(axis=-1, keepdims=True)
    return mx.concatenate([z @ fn.T, squares], axis=-1)[..., None]


@lru_cache(maxsize=1)
def _partials_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="hyper_partials", input_names=["X", "fn"], output_names=["partial"], source=PARTIALS
    )


@lru_cache(maxsize=4)
def _front_kernel(sizes: FrontSizes) -> Any:
    return mx.fast.metal_kernel(
        name="hyper_front",
        input_names=["partial", "X", "scale", "base"],
        output_names=["x", "post", "C"],
        header=sizes.header,
        source=FRONT,
    )


def _agrees(sizes: FrontSizes, plain: Front) -> bool:
    """Whether the kernels give what the definition gives, for few and many tokens."""
    S, D, M = sizes.streams, sizes.hidden, sizes.projected
    key = mx.random.split(mx.random.key(0), 4)
    fn = mx.random.normal((M, S * D), key=key[0]) * (S * D) ** -0.5
    base, scale = mx.random.normal((M,), key=key[1]), mx.array([1.0, 0.5, 2.0])
    try:
        for T in (1, STEP_TOKENS + 1):
            X = mx.random.normal((1, T, S, D), key=key[2])
            got = front_kernel(X, fn, scale, base, mx.float32, sizes)
            want = plain(X, fn, scale, base, mx.float32)
            worst = max(float(mx.abs(a - b).max()) for a, b in zip(got, want, strict=True))
            if not worst < CLOSE:
                raise ValueError(f"it is off by {worst:.2g}")
    except (RuntimeError, ValueError) as error:
        warnings.warn(
            f"The hyper-connection kernel is not used: {error}. Answers are the same, slower.",
            stacklevel=2,
        )
        return False
    return True
