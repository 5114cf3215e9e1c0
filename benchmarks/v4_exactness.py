"""Largest logit difference of DeepSeek-V4 in every mode of running it, float32 on CPU.

Against the golden logits, and against transformers on three random models. Needs the test
requirements (torch, transformers). With a folder of mlx-vlm's unpacked wheel (see `v4_peer`), the
same of its module with the same weights.

    python -m benchmarks.v4_exactness [--mlx-vlm FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlxsteer  # noqa: F401  (puts the fast BLAS in place before mlx is imported)

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from benchmarks import v4_peer
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


@dataclass(frozen=True)
class Case:
    """A model, token ids [1, T] and the logits [T, vocab] that it should give."""

    config: dict[str, Any]
    model: Model
    ids: mx.array
    want: np.ndarray


class Peer:
    """mlx-vlm's module with a case's weights, called as ours is."""

    def __init__(self, folder: Path, case: Case):
        self._module = v4_peer.language_model(folder, case.config)
        self._module.load_weights(tree_flatten(case.model.parameters()), strict=True)
        self.make_cache = self._module.make_cache

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        return self._module(ids, cache=cache).logits


def golden_case() -> Case:
    name = "tiny_fp32"
    return Case(tiny.config(name), tiny.model(name), tiny.token_ids(), tiny.golden(name)["logits"])


def random_case(shape: str) -> Case:
    with tempfile.TemporaryDirectory() as name:
        folder = random_models.write(Path(name), shape, seed=len(shape))
        values = json.loads((folder / "config.json").read_text())
        ids = np.random.default_rng(5).integers(2, values["vocab_size"], (1, T))
        want = transformers_logits(folder, ids)
        model = tiny.loaded(values, mx.load(str(folder / "model.safetensors")))
        mx.eval(model.parameters())
    return Case(values, model, mx.array(ids), want)


def differences(model: Any, case: Case) -> dict[str, float]:
    """By mode of running; nan where the model raises an error."""
    found = {"full, no cache": _tried(lambda: tiny.largest(model(case.ids)[0], case.want))}
    found["full"] = _pieces(model, case, [T])
    for size in (3, 10, 64, 129, 256):
        found[f"pieces of {size}"] = _pieces(model, case, tiny.pieces(T, size))
    for split in (1, 5, 7, 8, 9, 127, 128, 130, 200):
        found[f"decode from {split}"] = _pieces(model, case, [split] + [1] * 40)
    if isinstance(model, Model):
        found["snapshot, rollback"] = _rolled_back(model, case.ids, case.want)
        found["batch, 4 lengths"] = _batched(model, case.ids, case.want)
    return found


def _pieces(model: Any, case: Case, sizes: list[int]) -> float:
    want = case.want[: sum(sizes)]
    return _tried(lambda: tiny.largest(tiny.run(model, case.ids, sizes), want))


def _tried(difference: Callable[[], float]) -> float:
    try:
        return difference()
    except (ValueError, TypeError, IndexError):
        return math.nan


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mlx-vlm", type=Path, help="folder of the wheel")
    options = parser.parse_args()
    cases = {"golden": golden_case()}
    cases |= {shape: random_case(shape) for shape in random_models.SHAPES}
    show("mlxsteer", {name: differences(case.model, case) for name, case in cases.items()})
    if options.mlx_vlm:
        peers = {name: Peer(options.mlx_vlm, case) for name, case in cases.items()}
        show("mlx-vlm", {name: differences(peers[name], case) for name, case in cases.items()})


def show(title: str, columns: dict[str, dict[str, float]]) -> None:
    print(f"\n{title:20}" + "".join(f"{name:>14}" for name in columns))
    for mode in columns["golden"]:
        print(f"{mode:20}" + "".join(f"{column[mode]:14.1e}" for column in columns.values()))


if __name__ == "__main__":
    main()
