"""Largest logit difference of DeepSeek-V4 in every mode of running it, float32 on CPU.

Against the golden logits, and against transformers on three random models. Needs the test
requirements (torch, transformers).

    python -m benchmarks.v4_exactness
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import mlxsteer  # noqa: F401  (puts the fast BLAS in place before mlx is imported)

# isort: split
import mlx.core as mx
import numpy as np

from mlxsteer.models.deepseek_v4 import Model, restore, snapshot
from tests.v4 import random_models, tiny

T = 300


def transformers_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits[0].numpy()


def random_case(shape: str) -> tuple[Model, mx.array, np.ndarray]:
    with tempfile.TemporaryDirectory() as name:
        folder = random_models.write(Path(name), shape, seed=len(shape))
        values = json.loads((folder / "config.json").read_text())
        ids = np.random.default_rng(5).integers(2, values["vocab_size"], (1, T))
        want = transformers_logits(folder, ids)
        model = tiny.loaded(values, mx.load(str(folder / "model.safetensors")))
        mx.eval(model.parameters())
    return model, mx.array(ids), want


def differences(model: Model, ids: mx.array, want: np.ndarray) -> dict[str, float]:
    """By mode of running."""
    found = {"full, no cache": tiny.largest(model(ids)[0], want)}
    for size in (3, 10, 64, 129, 256):
        logits = tiny.run(model, ids, tiny.pieces(T, size))
        found[f"pieces of {size}"] = tiny.largest(logits, want)
    for split in (1, 5, 7, 8, 9, 127, 128, 130, 200):
        logits = tiny.run(model, ids, [split] + [1] * 40)
        found[f"decode from {split}"] = tiny.largest(logits, want[: split + 40])
    found["snapshot, rollback"] = _rolled_back(model, ids, want)
    found["batch, 4 lengths"] = _batched(model, ids, want)
    return found


def _rolled_back(model: Model, ids: mx.array, want: np.ndarray) -> float:
    cache = model.make_cache()
    tiny.run(model, ids, [126], cache)
    kept = snapshot(cache)
    tiny.run(model, ids[:, ::-1], [1, 9], cache)
    restore(cache, kept)
    return tiny.largest(tiny.run(model, ids[:, 126:], [1, 30, 1], cache), want[126:158])


def _batched(model: Model, ids: mx.array, want: np.ndarray) -> float:
    """Prefixes of four lengths, right-padded, then decoded together."""
    lengths = [1, 7, 64, 130]
    caches = [model.make_cache() for _ in lengths]
    cache: Any = [layer[0].merge(list(layer)) for layer in zip(*caches, strict=True)]
    for c in cache:
        c.prepare(lengths=lengths, right_padding=[130 - n for n in lengths])
    model(mx.repeat(ids[:, :130], 4, axis=0), cache=cache)
    for c in cache:
        c.finalize()
    worst = 0.0
    for step in range(12):
        logits = model(mx.stack([ids[0, n + step : n + step + 1] for n in lengths]), cache=cache)
        rows = [tiny.largest(logits[b, 0], want[n + step]) for b, n in enumerate(lengths)]
        worst = max(worst, *rows)
    return worst


def main() -> None:
    golden = tiny.model(), tiny.token_ids(), tiny.golden("tiny_fp32")["logits"]
    columns = {"golden": differences(*golden)}
    for shape in random_models.SHAPES:
        columns[shape] = differences(*random_case(shape))
    print(f"{'mode':20}" + "".join(f"{name:>14}" for name in columns))
    for mode in columns["golden"]:
        print(f"{mode:20}" + "".join(f"{column[mode]:14.1e}" for column in columns.values()))


if __name__ == "__main__":
    main()
