"""One process of a ring: runs the golden model split among two, and writes what it got."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from tests.v4 import tiny


def split_run(kind: str, group: mx.distributed.Group) -> dict[str, np.ndarray]:
    """Logits, steered logits and parameter bytes of this process's part of the model."""
    z = tiny.golden("tiny_fp32")
    built = tiny.loaded(tiny.config("tiny_fp32"), tiny.weights())
    if kind == "heads":
        built.shard(group)
    else:
        built.model.pipeline(group)
    mx.eval(built.parameters())
    ids, pieces = tiny.token_ids(), [100, 1, 27, 1, 1]
    logits = tiny.run(built, ids, pieces)
    v = mx.array(z["steer_vec"])
    built.layers[int(z["steer_layer"])].taps = tiny.FakeTaps(residual=lambda X: X + v)
    steered = tiny.run(built, ids, pieces)
    mine = sum(p.nbytes for _, p in tree_flatten(built.parameters()))
    return {f"{kind}_logits": logits, f"{kind}_steered": steered, f"{kind}_nbytes": mine}


def main(out: str) -> None:
    group = mx.distributed.init(strict=True, backend="ring")
    got = split_run("heads", group) | split_run("layers", group)
    np.savez(f"{out}.{group.rank()}.npz", **got)


if __name__ == "__main__":
    main(*sys.argv[1:])
