"""How large the arrays of a forward pass and the cache get, by shape arithmetic alone (spec D).

Attention goes tile by tile, so what it needs for a chunk of L tokens grows with the context
only through the rows that are read once per tile, never through L times context.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxsteer.models.deepseek_v4.attention import tile_size
from mlxsteer.models.deepseek_v4.cache import layer_shape
from mlxsteer.models.deepseek_v4.config import HEAVY, SPARSE, ModelArgs
from mlxsteer.models.deepseek_v4.indexer import SCORE_BLOCK

FLOAT32 = 4


def intermediates(args: ModelArgs, L: int, T: int) -> dict[str, int]:
    """Bytes of the large arrays while L tokens are processed that end at position T, one row.

    Logits are left out: a prefill chunk's are never computed unless they are asked for.
    """
    H, d, W, k = args.num_attention_heads, args.head_dim, args.sliding_window, args.index_topk
    kinds = set(args.compress_ratios)

    def scores(t: int, R: int) -> int:
        return H * t * (W + t - 1 + R)

    t = min(tile_size(args, 1, 0, False), L)
    found = {
        "streams": L * args.hc_mult * args.hidden_size,
        "expert outputs": L * args.num_experts_per_tok * args.hidden_size,
        "queries of a tile": t * H * d,
        "window scores of a tile": scores(t, 0),
    }
    if HEAVY in kinds:
        R = T // HEAVY
        t = min(tile_size(args, 1, R, False), L)
        found["scores of a tile, all rows of ratio 128"] = scores(t, R)
        found["rows of ratio 128"] = R * d
    if SPARSE in kinds:
        R = T // SPARSE
        t = min(tile_size(args, 1, R, False), L)
        found["scores of a tile, all rows of ratio 4"] = scores(t, min(R, k))
        found["compressor slots"] = (L + SPARSE) * 2 * 2 * d
        if k < R:
            g = min(tile_size(args, 1, R, True), L)
            found["chosen rows of a tile"] = g * k * d
            found["scores of a tile, chosen rows"] = scores(g, k)
            found["index scores of a block"] = args.index_n_heads * g * min(R, SCORE_BLOCK)
            found["index scores of a tile"] = g * R
    return {name: elements * FLOAT32 for name, elements in found.items()}


def largest_intermediate(args: ModelArgs, L: int, T: int) -> tuple[str, int]:
    """The largest of `intermediates`: its name and bytes."""
    return max(intermediates(args, L, T).items(), key=lambda item: item[1])


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence's state that are in use."""

    window: int
    rows: int
    index_keys: int
    open_windows: int

    @property
    def total(self) -> int:
        return self.window + self.rows + self.index_keys + self.open_windows


def cache_bytes(args: ModelArgs, T: int, itemsize: int = 2) -> CacheBytes:
    """The state after T tokens, `itemsize` bytes per element (open windows are float32)."""
    shapes = [layer_shape(args, layer) for layer in range(args.num_hidden_layers)]
    rows = sum(T // s.ratio * s.width for s in shapes if s.ratio)
    keys = sum(T // s.ratio * s.index_width for s in shapes if s.index_width)
    window = sum(s.window * s.width for s in shapes)
    # per slot: kv and gate; CSA: both halves pending and one half kept
    open_ = sum(
        s.ratio * 2 * (3 * (s.width + s.index_width) if s.ratio == SPARSE else s.width)
        for s in shapes
    )
    return CacheBytes(window * itemsize, rows * itemsize, keys * itemsize, open_ * 4)
