"""The kernels of selection: index scores, the rows that were chosen, the experts."""

from __future__ import annotations

import mlx.core as mx

from mlxsteer.models.deepseek_v4 import kernels
from mlxsteer.models.deepseek_v4.kernels import Body

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
    return kernels.launch(COMBINE, [dots, weights], {"H": H}, (R, N, 1), [((N, R), mx.float32)])[0]


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
    return kernels.launch(CHOSEN, [kv, best], sizes, (D, W + K, B), [((B, W + K, D), mx.float32)])[
        0
    ]


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
    experts, weights = kernels.launch(TOP, [biased, logits], {"E": E, "K": k}, (k, N, 1), outputs)
    return experts, weights
