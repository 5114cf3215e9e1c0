"""Features over the server: searched by words, steered with by name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from mlxsteer.model import Model
from mlxsteer.sae import features, index
from mlxsteer.vector import Calibration
from tests.server.api import WEB
from tests.server.dictionaries import small_dictionary


@pytest.fixture
def small(chatty: Model) -> Iterator[Path]:
    path = small_dictionary(chatty)
    yield path
    shutil.rmtree(path)


def found(address: str, **query: object) -> httpx.Response:
    return WEB.get(f"{address}/v1/steering/features", params=query)  # type: ignore[arg-type]


def names(reply: httpx.Response) -> list[str]:
    return [feature["name"] for feature in reply.json()["features"]]


def test_features_are_searched_by_words(address: str, small: Path) -> None:
    by_label = found(address, q="bridges").json()
    assert [f["name"] for f in by_label["features"]] == ["sae/small/4"]
    assert by_label["features"][0]["label"] == "bridges"
    assert found(address, q="w3").json()["features"][0]["snippets"][0]["token"] == "w3"
    everything = found(address, limit=3).json()
    assert everything["features"][0]["feature"] == 4  # the labelled one first
    assert (len(everything["features"]), everything["saes"]) == (3, ["small"])
    assert found(address, limit=0).status_code == 400


def test_a_number_finds_its_feature(address: str, small: Path) -> None:
    assert names(found(address, q=" 2 ")) == ["sae/small/2"]
    assert names(found(address, q="6")) == []


def test_pages_follow_each_other_without_a_gap(address: str, small: Path) -> None:
    pages = [found(address, limit=4, offset=offset) for offset in (0, 4)]
    assert [page.json()["more"] for page in pages] == [True, False]
    assert names(pages[0]) + names(pages[1]) == names(found(address)) == [
        f"sae/small/{number}" for number in (4, 0, 1, 2, 3, 5)
    ]  # fmt: skip
    assert found(address, offset=-1).status_code == 400


def test_several_dictionaries_take_turns_and_one_without_an_index_is_named(
    address: str, chatty: Model, small: Path
) -> None:
    other, bare = small_dictionary(chatty, "other", 2, seed=1), small_dictionary(chatty, "bare", 2)
    (bare / index.INDEX).unlink()
    reply = found(address, limit=4)
    for path in (other, bare):
        shutil.rmtree(path)
    assert names(reply) == ["sae/other/0", "sae/small/4", "sae/other/1", "sae/small/0"]
    assert (reply.json()["more"], reply.json()["without_index"]) == (True, ["bare"])


def test_a_feature_is_told_of_like_a_vector(address: str, chatty: Model, small: Path) -> None:
    def told(name: str) -> httpx.Response:
        return WEB.get(f"{address}/v1/steering/vectors/{name}")

    plain, clamp = told("sae/small/4").json(), told("sae/small/4/clamp").json()
    assert (plain["op"], clamp["op"], plain["layers"]) == ("add", "clamp", [1])
    assert (plain["name"], plain["description"], plain["source"]) == (
        "sae/small/4",
        "bridges",
        "feature",
    )
    assert told("sae%2Fsmall%2F3").json()["description"] == "w3"  # what it promotes
    assert (plain["calibrated"], plain["safe_max"]) == (False, None)
    name = features.resolve("sae/4", chatty.key)
    kept = replace(features.find("sae/4", chatty.key), calibration=Calibration(0.2, 0.1))
    kept.save(features.kept_path(name, chatty.key))
    limits = told("sae/small/4").json()
    assert (limits["delta_plus"], limits["delta_minus"], limits["safe_max"]) == (0.2, 0.1, 5)
    for missing in ("sae/small/99", "sae/none/1", "sae/small/../small/4x", "sae/"):
        assert told(missing).status_code == 404


def test_a_feature_steers_a_request(address: str, small: Path) -> None:
    def answer(steer: str) -> httpx.Response:
        messages = [{"role": "user", "content": "w7 w8"}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
        return WEB.post(f"{address}/v1/chat/completions", json={**body, "steer": steer})

    texts = {steer: answer(steer).json()["choices"][0]["message"]["content"]
             for steer in ("", "sae/4:0", "sae/bridges/clamp:4d@all")}  # fmt: skip
    assert texts[""] == texts["sae/4:0"] != texts["sae/bridges/clamp:4d@all"]
    for bad in ("sae/99:1", "sae/../small/4:1", "sae/nothing:1"):
        refused = answer(bad)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "unknown_vector"
