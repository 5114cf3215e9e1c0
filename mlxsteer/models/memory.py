"""Will a model fit? Bytes of weights and cache against what the machine has.

Estimates come from a config and a byte count alone; nothing here loads a model. The refusal
shows its sum, so that a reader can check it or overrule it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from mlxsteer.errors import ModelError
from mlxsteer.models.folder import text_config

GIB = 1 << 30
DEFAULT_CONTEXT = 8192  # tokens that the cache is counted for when nobody says otherwise
# Activations of one prefill chunk, the tokenizer, Python itself: the demo model's process takes
# 0.4 GiB beside its weights on Linux.
WORKING_BYTES = GIB // 2


@dataclass(frozen=True)
class MemoryEstimate:
    """What a loaded model needs, in bytes; the cache is for `context` tokens of one chat."""

    weight_bytes: int
    cache_bytes: int
    context: int
    working_bytes: int = WORKING_BYTES

    @property
    def total(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.working_bytes

    def arithmetic(self) -> str:
        """The sum, as text: `12.0 GiB weights + 0.3 GiB cache ... = 12.8 GiB`."""
        return (
            f"{_gib(self.weight_bytes)} weights + {_gib(self.cache_bytes)} cache"
            f" ({self.context:,} tokens) + {_gib(self.working_bytes)} working room"
            f" = {_gib(self.total)}"
        )


@dataclass(frozen=True)
class MemoryLimit:
    """How much there is, in bytes, and what says so."""

    nbytes: int
    source: str


def estimate(
    config: dict[str, Any],
    weight_bytes: int,
    context: int = DEFAULT_CONTEXT,
    element_bytes: int = 2,
) -> MemoryEstimate:
    """Memory for a model of `config` with weights of `weight_bytes`.

    `element_bytes` is the size of a cached number: 2 in half precision, 4 in float32.
    """
    text = text_config(config)
    context = min(context, text.get("max_position_embeddings") or context)
    return MemoryEstimate(weight_bytes, _cached_numbers(text, context) * element_bytes, context)


def check(need: MemoryEstimate, *, label: str, force: bool = False) -> None:
    """ModelError, with the arithmetic, when `need` is more than there is and not `force`."""
    limit = memory_limit()
    if force or fits(need, limit):
        return
    raise ModelError(
        f"{label} does not fit in memory: {need.arithmetic()}, and {limit.source} is"
        f" {_gib(limit.nbytes)}. Use a smaller model or a smaller quantisation, or go on at your"
        " own risk with --force (in Python: force=True); the machine may swap or stop."
    )


def fits(need: MemoryEstimate, limit: MemoryLimit | None = None) -> bool:
    return need.total <= (limit or memory_limit()).nbytes


def memory_limit() -> MemoryLimit:
    """The smaller of physical memory and, on Metal, the working set that it recommends."""
    physical = physical_memory()
    working_set = metal_working_set()
    if working_set is not None and working_set < physical:
        source = f"Metal's recommended working set (of {_gib(physical)} physical memory)"
        return MemoryLimit(working_set, source)
    return MemoryLimit(physical, "physical memory")


def physical_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def metal_working_set() -> int | None:
    """Bytes that Metal recommends to use at most; None where there is no Metal."""
    import mlx.core as mx

    if not mx.metal.is_available():
        return None
    size = mx.device_info().get("max_recommended_working_set_size")
    return int(size) if size else None


def _cached_numbers(text: dict[str, Any], context: int) -> int:
    """Numbers that the caches of all layers hold for `context` tokens; an upper estimate."""
    layers = text.get("num_hidden_layers", 0)
    if ratios := text.get("compress_ratios"):
        return sum(_compressed(text, ratio, context) for ratio in ratios[:layers])
    heads = text.get("num_attention_heads") or 0
    if not heads:
        return 0  # a state-space model: its state does not grow with the context
    if latent := text.get("kv_lora_rank"):
        return layers * context * (latent + text.get("qk_rope_head_dim", 0))
    head_dim = text.get("head_dim") or text.get("hidden_size", 0) // heads
    per_token = 2 * (text.get("num_key_value_heads") or heads) * head_dim
    return per_token * sum(_rows(text, layer, context) for layer in range(layers))


def _compressed(text: dict[str, Any], ratio: int, context: int) -> int:
    """One DeepSeek-V4 layer: the window, a row per `ratio` tokens, and for ratio 4 its index."""
    head_dim = text.get("head_dim", 0)
    window = min(context, text.get("sliding_window") or context) * head_dim
    if not ratio:
        return window
    index = text.get("index_head_dim", 0) if ratio == 4 else 0
    return window + context // ratio * (head_dim + index)


def _rows(text: dict[str, Any], layer: int, context: int) -> int:
    """Tokens that one layer's cache keeps: a sliding layer forgets all but its window."""
    kinds = text.get("layer_types") or []
    window = text.get("sliding_window")
    if window and layer < len(kinds) and kinds[layer] == "sliding_attention":
        return min(context, window)
    return context


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"
