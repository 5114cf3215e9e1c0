"""DeepSeek-V4 here and in mlx-vlm, side by side: the same float32 weights, one process, on CPU.

Prints the weights' size, tokens per second (medians), how many times mlx-vlm's each is, and how far
each one's logits are from a full forward pass: median and largest over rounds. (Two index scores
that differ by rounding may choose another row.) "MLX alone" is ours without what it does for CPUs
(`models/deepseek_v4/host*.py`). The residual stream, the experts' width and their number are an
eighth of the real model's, with its three kinds of layer; heads, head size, query rank and index
top-k are a quarter. mlx-vlm is a folder of its unpacked wheel (see `v4_peer`):

    python -m benchmarks.v4_side_by_side --mlx-vlm mlx-vlm
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlxsteer  # noqa: F401  (puts the fast BLAS in place before mlx is imported)

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from benchmarks import v4_peer
from mlxsteer.models.deepseek_v4 import Model, ModelArgs
from mlxsteer.models.deepseek_v4.fusing import Switch

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 512,
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 256,
    "o_lora_rank": 128,
    "o_groups": 4,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 128,
    "sliding_window": 128,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_hash_layers": 2,
    "compress_ratios": [0, 0, 4, 128, 4, 128],
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "max_position_embeddings": 1048576,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "activation_rounding": False,  # mlx-vlm has none
}


def ours() -> Model:
    """Random weights of a scale at which the logits mean something."""
    model = Model(ModelArgs.from_dict(CONFIG))

    def draw(path: str, p: mx.array) -> mx.array:
        if path.endswith("tid2eid"):
            return mx.random.randint(0, CONFIG["n_routed_experts"], p.shape)
        if path.endswith("norm.weight"):
            return mx.ones(p.shape)
        return mx.random.normal(p.shape) * max(p.shape[-1], 16) ** -0.5

    mx.random.seed(0)
    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


def theirs(folder: Path, weights: list[tuple[str, mx.array]]) -> Any:
    """mlx-vlm's language model with the same weights."""
    model = v4_peer.language_model(folder, CONFIG)
    model.load_weights(weights, strict=True)
    return model


class MLXAlone:
    """A model of ours as a GPU would run it, had it no kernels."""

    def __init__(self, model: Model):
        self._model, self.make_cache = model, model.make_cache

    def __call__(self, ids: mx.array, cache: Any) -> mx.array:
        with patch.object(Switch, "on_host", False):
            return self._model(ids, cache=cache)


def megabytes(model: Model) -> tuple[float, float]:
    """Of all weights, and of those that one decoded token multiplies with."""
    named = tree_flatten(model.parameters())
    chosen = CONFIG["num_experts_per_tok"] / CONFIG["n_routed_experts"]
    tables = ("embed_tokens", "tid2eid")
    read = sum(
        p.nbytes * (chosen if ".switch_mlp." in path else 1)
        for path, p in named
        if not any(table in path for table in tables)
    )
    return sum(p.nbytes for _, p in named) / 1e6, read / 1e6


def logits_of(model: Any, ids: mx.array, cache: Any) -> mx.array:
    out = model(ids, cache=cache)
    return getattr(out, "logits", out)


def prefill(model: Any, ids: mx.array) -> tuple[float, mx.array, Any]:
    """Seconds, the last position's logits, and the cache."""
    cache = model.make_cache()
    begin = time.perf_counter()
    last = logits_of(model, ids, cache)[:, -1]
    mx.eval(last, [c.state for c in cache])
    return time.perf_counter() - begin, last, cache


def decode(model: Any, ids: mx.array, cache: Any, steps: int) -> tuple[float, mx.array]:
    """Seconds per token over `steps` given tokens, and the last logits.

    Evaluates the logits alone, as mlx-lm's generator does.
    """
    begin = time.perf_counter()
    for i in range(steps):
        last = logits_of(model, ids[:, i : i + 1], cache)[:, -1]
        mx.eval(last)
    return (time.perf_counter() - begin) / steps, last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mlx-vlm", type=Path, required=True, help="folder of the wheel")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="of prompts")
    parser.add_argument("--steps", type=int, default=8, help="decoded tokens in a round")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    first = ours()
    models = {
        "mlxsteer": first,
        "MLX alone": MLXAlone(first),
        "mlx-vlm": theirs(options.mlx_vlm, tree_flatten(first.parameters())),
    }
    print("{:.0f} MB of weights, of which a token reads {:.0f}".format(*megabytes(first)))
    print(f"{'':10}{'mode':>14}{'tokens/s':>10}{'ratio':>8}{'logits off by':>16}{'at most':>10}")
    for T in options.lengths:
        ids = mx.random.randint(0, CONFIG["vocab_size"], (1, T + options.steps * options.rounds))
        compare(models, ids, T, options.steps, options.rounds)


def compare(models: dict[str, Any], ids: mx.array, T: int, steps: int, rounds: int) -> None:
    """Print both modes of both models for a prompt of T tokens.

    The models take turns in short rounds, for machines that others use too; a ratio is the
    median over rounds.
    """
    truth = models["mlxsteer"](ids)[0]
    caches = {name: prefill(model, ids[:, :T])[2] for name, model in models.items()}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in range(rounds):
        at = T + r * steps
        for name, model in models.items():
            if r < max(2, rounds // 3):
                seconds, last, _ = prefill(model, ids[:, :T])
                note(found, name, "prefill", seconds / T, last - truth[T - 1])
            seconds, last = decode(model, ids[:, at : at + steps], caches[name], steps)
            note(found, name, "decode", seconds, last - truth[at + steps - 1])
    for mode in ("prefill", "decode"):
        rival = [seconds for seconds, _ in found["mlx-vlm", mode]]
        for name in models:
            seconds_of = [seconds for seconds, _ in found[name, mode]]
            ratio = statistics.median(b / a for a, b in zip(seconds_of, rival, strict=True))
            off = [off for _, off in found[name, mode]]
            speed = 1 / statistics.median(seconds_of)
            label = f"{name:10}{f'{mode} {T}':>14}"
            errors = f"{statistics.median(off):16.1e}{max(off):10.1e}"
            print(f"{label}{speed:10.1f}{ratio:8.2f}{errors}")


def note(found: Any, name: str, mode: str, seconds: float, off: mx.array) -> None:
    found.setdefault((name, mode), []).append((seconds, mx.abs(off).max().item()))


if __name__ == "__main__":
    main()
