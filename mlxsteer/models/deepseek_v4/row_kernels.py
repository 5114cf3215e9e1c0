"""The kernels that make rows for the cache: finished kv rows, rounded keys, pooled windows."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxsteer.models.deepseek_v4 import kernels
from mlxsteer.models.deepseek_v4.kernels import Body

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
    return kernels.launch(ROW, given, sizes, grid, [(y.shape, dtype)], (("NORM_EPS", eps),))[0]


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
    return kernels.launch(INDEX, [x], sizes, (x.size, 1, 1), [(x.shape, dtype)])[0]


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
    return kernels.launch(POOL, [slots], sizes, (c, B * N, 1), [((B, N, c), mx.float32)])[0]
