"""Tiny models and small helpers for the DeepSeek-V4 tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlxsteer  # noqa: F401  (puts the fast BLAS in place before mlx is imported)

# isort: split
import mlx.core as mx
import numpy as np

from mlxsteer.models.deepseek_v4 import Model, ModelArgs

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v4"
EXACT = 1e-4


def config(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "config.json").read_text())


def golden(name: str) -> Any:
    return np.load(FIXTURES / f"{name}.npz")


@cache
def model(name: str = "tiny_fp32", activation_rounding: bool | None = None) -> Model:
    """A golden model with float32 activations. Shared by tests: leave it as it is."""
    values = config(name)
    if activation_rounding is not None:
        values["activation_rounding"] = activation_rounding
    return loaded(values, weights(name))


def weights(name: str = "tiny_fp32") -> dict[str, mx.array]:
    return mx.load(str(FIXTURES / name / "model.safetensors"))


def loaded(values: dict[str, Any], tensors: dict[str, mx.array]) -> Model:
    built = Model(ModelArgs.from_dict(values))
    built.load_weights(list(built.sanitize(tensors).items()), strict=True)
    built.set_dtype(mx.float32)
    built.eval()
    return built


def token_ids(name: str = "tiny_fp32") -> mx.array:
    """[1, T]"""
    return mx.array(golden(name)["ids"])[None]


def run(built: Model, ids: mx.array, pieces: list[int], cache: Any = None) -> np.ndarray:
    """Logits [T, V] of one row, processed in pieces of the given lengths."""
    cache = built.make_cache() if cache is None else cache
    out, i = [], 0
    for n in pieces:
        out.append(built(ids[:, i : i + n], cache=cache))
        mx.eval(out[-1])
        i += n
    return np.array(mx.concatenate(out, axis=1)[0])


def pieces(T: int, size: int) -> list[int]:
    return [size] * (T // size) + ([T % size] if T % size else [])


def largest(a: Any, b: Any) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


class FakeTaps:
    """What an installed tap does: edits by site, and a record of what passed."""

    def __init__(self, **edits: Any):
        self.edits, self.seen = edits, {}

    def apply(self, site: str, x: mx.array) -> mx.array:
        x = self.edits[site](x) if site in self.edits else x
        self.seen[site] = x
        return x
