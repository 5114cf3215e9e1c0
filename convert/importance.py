"""How much each input column of each matrix matters: second moments of its inputs.

The expected output error of a linear layer with weight error dW is sum_k E[x_k^2] dW[:, k]^2 when
inputs are uncorrelated, so E[x_k^2] is the weight of column k in the search of `quantise`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.plan import Plan
from mlxsteer.convert.shard_file import file_sha256
from mlxsteer.files import atomic_path

# Modules that read the same input: it is measured and stored once. (The indexer is not even
# called on texts short enough to attend to everything.)
SAME_INPUT = ((".up_proj", ".gate_proj"), (".attn.indexer.wq_b", ".attn.wq_b"))
# An expert seen on few tokens leans on the mean of its layer, as if seen on this many more.
PRIOR_TOKENS = 16.0
# No column is free: activations that calibration never saw will come.
FLOOR = 1e-3


@dataclass(frozen=True)
class Importance:
    """Second moments by module path, `[cols]` or `[stack, cols]`, and what file they are from."""

    moments: dict[str, mx.array] = field(default_factory=dict)
    name: str = ""

    def of(self, path: str, index: int) -> mx.array | None:
        """The weights of piece `index` of a module, mean 1; None where nothing was measured."""
        moments = self.moments.get(path)
        for own, other in SAME_INPUT:
            if moments is None and path.endswith(own):
                moments = self.moments.get(path.removesuffix(own) + other)
        if moments is None:
            return None
        row = (moments if moments.ndim == 1 else moments[index]).astype(mx.float32)
        return mx.maximum(row / mx.maximum(row.mean(), 1e-30), FLOOR)


def smooth(moments: mx.array, counts: mx.array) -> mx.array:
    """Second moments `[E, cols]` of experts seen on `counts` `[E]` tokens, drawn to their mean."""
    n = counts.astype(mx.float32)[:, None]
    mean = (moments * n).sum(0, keepdims=True) / mx.maximum(n.sum(), 1)
    return (moments * n + mean * PRIOR_TOKENS) / (n + PRIOR_TOKENS)


def save_importance(path: Path, moments: dict[str, mx.array], tokens: int, model: str) -> None:
    """Write an importance file: one array per module path."""
    notes = {"kind": "mlxsteer-importance", "tokens": str(tokens), "model": model}
    with atomic_path(path) as temporary:
        mx.save_safetensors(str(temporary), moments, notes)


def load_importance(path: Path, plan: Plan | None = None) -> Importance:
    """Read an importance file and, with a plan, check that it is of that model."""
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise ConvertError(f"Cannot read the importance file {path}: {error}") from error
    moments, notes = loaded
    if notes.get("kind") != "mlxsteer-importance":
        raise ConvertError(
            f"{path} is not an importance file. Make one with `mlxsteer convert importance`."
        )
    if plan is not None:
        _check(path, moments, plan)
    return Importance(dict(moments), f"{path.name}, sha256 {file_sha256(path)[:16]}")


def _check(path: Path, moments: dict[str, mx.array], plan: Plan) -> None:
    matrices = {p.matrix.path: p.matrix for p in plan.matrices()}
    for name, array in moments.items():
        matrix = matrices.get(name)
        shapes = [(matrix.cols,), (matrix.stack, matrix.cols)] if matrix else []
        if tuple(array.shape) not in shapes:
            raise ConvertError(
                f"{path} was measured on another model: {name} {list(array.shape)} does not fit."
                " Measure this one with `mlxsteer convert importance`."
            )
        if not bool(mx.isfinite(array).all().item()) or bool((array < 0).any().item()):
            raise ConvertError(f"{path}: {name} holds values that are not second moments.")
