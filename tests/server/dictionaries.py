"""A small dictionary with an index and a label, for tests of what finds and uses features."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxsteer.model import Model
from mlxsteer.sae import folder, index, labels, shelf
from mlxsteer.sae.dictionary import Dictionary
from mlxsteer.sae.index import Feature, Index, Snippet
from mlxsteer.sae.labels import Label


def small_dictionary(
    model: Model, name: str = "small", count: int = 6, label: str = "bridges", seed: int = 0
) -> Path:
    """The folder of a random dictionary of `count` features, of which the fifth has a label.

    Feature i fires on the word `wi` and promotes it.
    """
    rows = np.random.default_rng(seed).normal(size=(count, model.d_model)).astype(np.float32)
    made = Dictionary("standard", mx.array(rows.T), mx.array(rows), mx.zeros(model.d_model),
                      mx.zeros(count), about={"layer": 1, "site": "residual"})  # fmt: skip
    path = folder.write(made, shelf.place_for(name, model.key))
    features = {
        i: Feature(i, 0.1, 9.0 - i / 10, 0.1, (f" w{i}",), (Snippet("the ", f"w{i}", "", 2.0, 0),))
        for i in range(count)
    }
    index.write(Index(features, (), {}), path)
    labels.keep(path, {4: Label(label, 0.9, 6, 0.0, "somebody")})
    return path
