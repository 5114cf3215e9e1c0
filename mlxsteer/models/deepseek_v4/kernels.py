"""Metal kernels, each a twin of a plain definition elsewhere. Not yet run on Metal.

A body touches no shared memory and needs no barrier, so it also compiles as C++, and tests run
it so against its definition. On Metal a kernel is compared with its definition when first
used; if it fails or differs, a warning is given once and the definition runs instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar

import mlx.core as mx

from mlxsteer.models.deepseek_v4.fusing import Switch

LANES = 32  # partial sums per projected value; neighbouring threads read neighbouring weights
STEP_TOKENS = 8  # up to this many tokens the projection is a kernel too, beyond it a product
CLOSE = 1e-3

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Body:
    """The body of one kernel, in the common ground of Metal and C++."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str


def launch(
    body: Body,
    inputs: Sequence[mx.array],
    constants: dict[str, Any],
    grid: tuple[int, int, int],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    reals: tuple[tuple[str, float], ...] = (),
) -> list[mx.array]:
    """Run a body once per grid point. `constants` are types and integers, `reals` macros."""
    return _built(body, reals)(
        inputs=list(inputs),
        template=list(constants.items()),
        grid=grid,
        threadgroup=(min(grid[0], 256), 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )


@lru_cache(maxsize=32)
def _built(body: Body, reals: tuple[tuple[str, float], ...]) -> Any:
    return mx.fast.metal_kernel(
        name=body.name,
        input_names=list(body.inputs),
        output_names=list(body.outputs),
        header="".join(f"#define {name} {value!r}f\n" for name, value in reals),
        source=body.source,
    )


def twin(kernel: Callable[..., Any], sample: Callable[[], tuple[Any, ...]]) -> Callable[[F], F]:
    """The decorated definition, run as `kernel` where kernels are on and the two agree.

    `sample` makes arguments to compare them on.
    """

    def choose(plain: F) -> F:
        @lru_cache(maxsize=1)
        def agrees() -> bool:
            return _agree(plain.__name__, plain, kernel, sample())

        @wraps(plain)
        def run(*args: Any) -> Any:
            return (kernel if Switch.kernels and agrees() else plain)(*args)

        run.pair = (plain, kernel, sample)  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return choose


def _agree(name: str, plain: Any, kernel: Any, args: tuple[Any, ...]) -> bool:
    try:
        worst = largest_difference(kernel(*args), plain(*args))
        if not worst < CLOSE:
            raise ValueError(f"it is off by {worst:.2g}")
    except (RuntimeError, ValueError) as error:
        warnings.warn(
            f"The kernel for {name} is not used: {error}. Answers are the same, slower.",
            stacklevel=3,
        )
        return False
    return True


def largest_difference(a: Any, b: Any) -> float:
    """Over one array or a tuple of arrays."""
    if isinstance(a, mx.array):
        a, b = (a,), (b,)
    return max(
        float(mx.abs(x.astype(mx.float32) - y.astype(mx.float32)).max())
        for x, y in zip(a, b, strict=True)
    )


# -- hyper-connections --------------------------------------------------------------------------

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
    x, post, C = launch(
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
    return launch(PARTIALS, [X, fn], sizes, (LANES, M + 1, N), [(shape, mx.float32)])[0]


def _products(X: mx.array, fn: mx.array) -> mx.array:
    """[N, M + 1, 1] by a matrix product."""
    z = X.reshape(-1, fn.shape[1]).astype(mx.float32)
    squares = mx.square(z).sum(axis=-1, keepdims=True)
    return mx.concatenate([z @ fn.T, squares], axis=-1)[..., None]


# -- rows ---------------------------------------------------------------------------------------

# One kv row: RMSNorm, rotation of the last dims, e4m3 per block of the others.
# y [N, D] T; weight [D]; periods [D / 2]; position [N] int -> row [N, D] O
ROW = Body(
    "kv_row",
    ("y", "weight", "periods", "position"),
    ("row",),
    """
    uint d = thread_position_in_grid.x;
    uint n = thread_position_in_grid.y;
    float squares = 0.0f;
    for (uint i = 0; i < D; ++i) {
        float v = float(y[n * D + i]);
        squares += v * v;
    }
    float r = 1.0f / metal::sqrt(squares / float(D) + NORM_EPS);
    float v = float(y[n * D + d]) * r * float(weight[d]);
    if (d >= NOPE) {
        uint other = (d % 2 == 0) ? d + 1 : d - 1;
        float angle = float(position[n]) * (1.0f / periods[d / 2]);
        float w = float(y[n * D + other]) * r * float(weight[other]);
        float sine = metal::sin(angle);
        v = v * metal::cos(angle) + (d % 2 == 0 ? -w * sine : w * sine);
    } else if (ROUNDED) {
        uint begin = d - d % BLOCK;
        float amax = 1e-4f;
        for (uint i = begin; i < begin + BLOCK; ++i) {
            amax = metal::max(amax, metal::fabs(float(y[n * D + i]) * r * float(weight[i])));
        }
        uint bits = (as_type<uint>(amax * (1.0f / 448.0f)) + 0x7FFFFFu) & 0x7F800000u;
        float scale = as_type<float>(bits);
        float code = v / scale;
        float size = metal::max(metal::fabs(code), 0.015625f);
        float step = as_type<float>(as_type<uint>(size) & 0x7F800000u) * 0.125f;
        v = metal::rint(code / step) * step * scale;
    }
    row[n * D + d] = O(v);
""",
)


def kv_row(
    y: mx.array,
    weight: mx.array,
    rope: Any,
    position: mx.array,
    dtype: mx.Dtype,
    constants: tuple[int, bool, float],
) -> mx.array:
    """`attention.finished_row`, one launch. y [..., D], position [N] for its N rows."""
    nope, rounded, eps = constants
    D = y.shape[-1]
    sizes = {"D": D, "NOPE": nope, "ROUNDED": int(rounded), "BLOCK": 64, "O": dtype}
    grid = (D, y.size // D, 1)
    given = [y, weight, rope.periods, position]
    return launch(ROW, given, sizes, grid, [(y.shape, dtype)], (("NORM_EPS", eps),))[0]


# e2m1 per block of 32. x [N, D] float -> row [N, D] O
INDEX = Body(
    "round_e2m1",
    ("x",),
    ("row",),
    """
    uint i = thread_position_in_grid.x;
    uint begin = i - i % BLOCK;
    float amax = 7.052966104933725e-38f;
    for (uint j = begin; j < begin + BLOCK; ++j) {
        amax = metal::max(amax, metal::fabs(x[j]));
    }
    uint bits = (as_type<uint>(amax * (1.0f / 6.0f)) + 0x7FFFFFu) & 0x7F800000u;
    float scale = as_type<float>(bits);
    float code = metal::max(metal::min(x[i] / scale, 6.0f), -6.0f);
    float size = metal::fabs(code);
    float step = size < 2.0f ? 0.5f : (size < 4.0f ? 1.0f : 2.0f);
    row[i] = O(metal::rint(code / step) * step * scale);
""",
)


def round_e2m1(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """`rounding.round_e2m1` in one launch; x float32."""
    sizes = {"BLOCK": 32, "O": dtype}
    return launch(INDEX, [x], sizes, (x.size, 1, 1), [(x.shape, dtype)])[0]


# The gate-weighted sum over the slots of a window, per channel.
# slots [N, S, 2, c] float (kv, gate) -> rows [N, c]
POOL = Body(
    "pool_window",
    ("slots",),
    ("rows",),
    """
    uint i = thread_position_in_grid.x;
    uint n = thread_position_in_grid.y;
    float top = -INFINITY;
    for (uint s = 0; s < SLOTS; ++s) {
        top = metal::max(top, slots[((n * SLOTS + s) * 2 + 1) * WIDTH + i]);
    }
    float total = 0.0f;
    float sum = 0.0f;
    for (uint s = 0; s < SLOTS; ++s) {
        float weight = metal::exp(slots[((n * SLOTS + s) * 2 + 1) * WIDTH + i] - top);
        total += weight;
        sum += weight * slots[(n * SLOTS + s) * 2 * WIDTH + i];
    }
    rows[n * WIDTH + i] = sum / total;
""",
)


def pool(slots: mx.array) -> mx.array:
    """`compressor.pool` in one launch. slots [B, N, S, 2, c] -> [B, N, c]."""
    B, N, S, _, c = slots.shape
    sizes = {"SLOTS": S, "WIDTH": c}
    return launch(POOL, [slots], sizes, (c, B * N, 1), [((B, N, c), mx.float32)])[0]


# -- selection ----------------------------------------------------------------------------------

# The weighted sum over heads of relu(dots). dots [N, H, R] T; weights [N, H] -> scores [N, R]
COMBINE = Body(
    "index_scores",
    ("dots", "weights"),
    ("scores",),
    """
    uint i = thread_position_in_grid.x;
    uint n = thread_position_in_grid.y;
    uint R = dots_shape[2];
    float sum = 0.0f;
    for (uint h = 0; h < H; ++h) {
        sum += float(weights[n * H + h]) * metal::max(float(dots[(n * H + h) * R + i]), 0.0f);
    }
    scores[n * R + i] = sum;
""",
)


def combine(dots: mx.array, weights: mx.array) -> mx.array:
    """`indexer.combined`. dots [N, H, R], weights [N, H] -> [N, R] float32."""
    N, H, R = dots.shape
    return launch(COMBINE, [dots, weights], {"H": H}, (R, N, 1), [((N, R), mx.float32)])[0]


# The ring and the chosen rows of a layer's buffer.
# kv [B, slots, D] T; best [B, K] uint -> rows [B, W + K, D] float
CHOSEN = Body(
    "chosen_rows",
    ("kv", "best"),
    ("rows",),
    """
    uint d = thread_position_in_grid.x;
    uint i = thread_position_in_grid.y;
    uint b = thread_position_in_grid.z;
    uint slot = i < W ? i : W + uint(best[b * K + (i - W)]);
    rows[(b * (W + K) + i) * D + d] = float(kv[(b * uint(kv_shape[1]) + slot) * D + d]);
""",
)


def chosen_rows(kv: mx.array, best: mx.array, W: int) -> mx.array:
    """`attention.chosen_rows`, float32. kv [B, slots, D], best [B, K] -> [B, W + K, D]."""
    (B, _, D), K = kv.shape, best.shape[1]
    sizes = {"W": W, "K": K, "D": D}
    return launch(CHOSEN, [kv, best], sizes, (D, W + K, B), [((B, W + K, D), mx.float32)])[0]


# The k experts of largest biased affinity, in falling order, and their weights.
# biased [N, E]; logits [N, E] -> experts [N, K] uint; weights [N, K]
TOP = Body(
    "top_experts",
    ("biased", "logits"),
    ("experts", "weights"),
    """
    uint slot = thread_position_in_grid.x;
    uint n = thread_position_in_grid.y;
    float last = INFINITY;
    uint at = 0;
    float total = 0.0f;
    float mine = 0.0f;
    for (uint pass = 0; pass < K; ++pass) {
        float best = -INFINITY;
        uint found = 0;
        for (uint e = 0; e < E; ++e) {
            float v = biased[n * E + e];
            bool left = v < last || (v == last && pass > 0 && e > at);
            if (left && v > best) {
                best = v;
                found = e;
            }
        }
        last = best;
        at = found;
        float l = logits[n * E + found];
        float x = metal::exp(-metal::fabs(l));
        float u = 1.0f + x;
        float tail = u == 1.0f ? x : metal::log(u) * x / (u - 1.0f);
        float affinity = metal::sqrt(metal::max(l, 0.0f) + tail);
        total += affinity;
        if (pass == slot) {
            mine = affinity;
            experts[n * K + slot] = found;
        }
    }
    weights[n * K + slot] = mine / total;
""",
)


def top_experts(biased: mx.array, logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """`experts.top_experts` in one launch."""
    N, E = biased.shape
    outputs = [((N, k), mx.uint32), ((N, k), mx.float32)]
    experts, weights = launch(TOP, [biased, logits], {"E": E, "K": k}, (k, N, 1), outputs)
    return experts, weights
