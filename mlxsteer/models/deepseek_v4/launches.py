"""Counts what one decoded token of DeepSeek-V4-Flash launches, from the lazily built graph.

The 43-layer layout is the real one; widths are tiny, because only the graph is counted. Views
are left out; RMSNorm, RoPE, a compiled group and a custom kernel count one each, as they are
on Metal. Works without a GPU: what only a GPU has is stood in for by one primitive.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxsteer.models.deepseek_v4 import kernels
from mlxsteer.models.deepseek_v4.config import ModelArgs
from mlxsteer.models.deepseek_v4.fusing import Switch
from mlxsteer.models.deepseek_v4.model import Model

LAYOUT: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 64,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 43,
    "num_attention_heads": 8,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 64,
    "o_lora_rank": 64,
    "o_groups": 2,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 4,
    "sliding_window": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "num_hash_layers": 3,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4],
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
VIEWS = {
    "Reshape",
    "Flatten",
    "Unflatten",
    "Squeeze",
    "ExpandDims",
    "Transpose",
    "Broadcast",
    "BroadcastAxes",
    "Slice",
    "Split",
    "Depends",
    "AsStrided",
    "StopGradient",
    "View",
}
# Stand-ins of one primitive each for operations that the CPU backend spells out.
STAND_INS = {"Scan": "RMSNorm", "CumSum": "RMSNorm", "Sort": "RoPE", "ArgSort": "custom kernel"}


def quantised_model(rounding: bool) -> Model:
    """Random weights, 8-bit matrices and 4-bit experts, as a converted model has them."""
    model = Model(ModelArgs.from_dict(LAYOUT | {"activation_rounding": rounding}))

    nn.quantize(model, class_predicate=packing)
    narrow(model)
    return model


def packing(path: str, module: nn.Module) -> bool | dict[str, Any]:
    """How a converted model packs the module at `path`."""
    if not hasattr(module, "to_quantized") or "compressor" in path or "weights_proj" in path:
        return False
    bits = 4 if "switch_mlp" in path else 8
    return {"group_size": 32, "bits": bits, "mode": f"mxfp{bits}"}


def narrow(model: Any) -> None:
    """Cast to bfloat16 what a converted model holds in it."""
    keep = model.cast_predicate
    parameters: Any = tree_flatten(model.parameters())
    for path, value in parameters:
        if value.dtype == mx.float32 and keep(path):
            model.load_weights([(path, value.astype(mx.bfloat16))], strict=False)
    mx.eval(model.parameters())


def graph(*outputs: mx.array) -> Counter[str]:
    """Primitives of the unevaluated graph of `outputs`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *outputs)
        names = re.findall(r'\{ \d+ \[label ="(\w+)"', path.read_text())
    return Counter(_name(n) for n in names)


def _name(primitive: str) -> str:
    if primitive.startswith("Compiled"):
        return "compiled group"
    return STAND_INS.get(primitive, primitive)


def decode_step(model: Model, position: int) -> Counter[str]:
    """The graph of the token at `position`."""
    cache = model.make_cache()
    for layer in cache:
        layer.fill(position, mx.bfloat16)
        mx.eval(layer.arrays)
    token = mx.zeros((1, 1), dtype=mx.int32)
    with stand_ins():
        return graph(model(token, cache=cache))


@contextmanager
def stand_ins() -> Iterator[None]:
    """The graph as it is on a GPU, with one primitive for each operation that only a GPU has."""
    with ExitStack() as stack:
        for name, stand_in in (("rms_norm", _norm), ("rope", _rope)):
            stack.enter_context(patch.object(mx.fast, name, stand_in))
        stack.enter_context(patch.object(kernels, "launch", _kernel))
        stack.enter_context(patch.object(kernels, "_agree", lambda *_: True))
        stack.enter_context(patch.object(Switch, "kernels", True))
        stack.enter_context(patch.object(Switch, "compiling", True))
        stack.enter_context(patch.object(Switch, "on_host", False))
        yield


def _kernel(body: Any, inputs: Any, constants: Any, grid: Any, outputs: Any, *_: Any) -> Any:
    """One primitive that depends on every input, and outputs that are views of it."""
    one = mx.depends(mx.argsort(inputs[0].flatten()), list(inputs[1:]))
    return [mx.as_strided(one.view(dtype), shape, [0] * len(shape)) for shape, dtype in outputs]


def _norm(x: mx.array, *_: Any, **__: Any) -> mx.array:
    return mx.cumsum(x, axis=-1)


def _rope(x: mx.array, *_: Any, **__: Any) -> mx.array:
    return mx.sort(x)


def launches(counts: Counter[str]) -> int:
    return sum(n for name, n in counts.items() if name not in VIEWS)


# Positions of the sparse regime, by what happens there.
STEPS = {"no window closes": 129, "ratio 4 closes": 131, "both close": 255}


def decode_launches(rounding: bool = True) -> dict[str, Counter[str]]:
    """Primitives of one decoded token, for the positions of `STEPS`."""
    model = quantised_model(rounding)
    return {label: decode_step(model, position) for label, position in STEPS.items()}


def mean_launches(counts: dict[str, Counter[str]]) -> float:
    """Launches per token over a long answer: windows of 4 and of 128 close in turn."""
    none, four, both = (launches(counts[label]) for label in STEPS)
    return (96 * none + 31 * four + both) / 128
