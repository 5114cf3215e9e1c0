"""Features over the server: searched by words, steered with by name."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import mlx.core as mx
import numpy as np
import pytest

from mlxsteer.model import Model
from mlxsteer.sae import folder, index, labels, shelf
from mlxsteer.sae.dictionary import Dictionary
from mlxsteer.sae.index import Feature, Index, Snippet
from mlxsteer.sae.labels import Label


@pytest.fixture
def small(chatty: Model) -> Iterator[None]:
    rows = np.random.default_rng(0).normal(size=(6, chatty.d_model)).astype(np.float32)
    made = Dictionary("standard", mx.array(rows.T), mx.array(rows), mx.zeros(chatty.d_model),
                      mx.zeros(6), about={"layer": 1, "site": "residual"})  # fmt: skip
    path = folder.write(made, shelf.place_for("small", chatty.key))
    features = {
        i: Feature(i, 0.1, 2.0, 0.1, (f" w{i}",), (Snippet("the ", f"w{i}", "", 2.0, 0),))
        for i in range(6)
    }
    index.write(Index(features, (), {}), path)
    labels.keep(path, {4: Label("bridges", 0.9, 6, 0.0, "somebody")})
    yield
    for file in path.iterdir():
        file.unlink()


def found(address: str, **query: object) -> httpx.Response:
    return httpx.get(f"{address}/v1/steering/features", params=query)  # type: ignore[arg-type]


def test_features_are_searched_by_words(address: str, small: None) -> None:
    by_label = found(address, q="bridges").json()
    assert [f["name"] for f in by_label["features"]] == ["sae/small/4"]
    assert by_label["features"][0]["label"] == "bridges"
    assert found(address, q="w3").json()["features"][0]["snippets"][0]["token"] == "w3"
    everything = found(address, limit=3).json()
    assert everything["features"][0]["feature"] == 4  # the labelled one first
    assert (len(everything["features"]), everything["saes"]) == (3, ["small"])
    assert found(address, limit=0).status_code == 400


def test_a_feature_steers_a_request(address: str, small: None) -> None:
    def answer(steer: str) -> httpx.Response:
        messages = [{"role": "user", "content": "w7 w8"}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
        return httpx.post(
            f"{address}/v1/chat/completions", json={**body, "steer": steer}, timeout=60
        )

    texts = {steer: answer(steer).json()["choices"][0]["message"]["content"]
             for steer in ("", "sae/4:0", "sae/bridges/clamp:4d@all")}  # fmt: skip
    assert texts[""] == texts["sae/4:0"] != texts["sae/bridges/clamp:4d@all"]
    for bad in ("sae/99:1", "sae/../small/4:1", "sae/nothing:1"):
        refused = answer(bad)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "unknown_vector"
