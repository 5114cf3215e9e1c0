"""Names become vectors in one order, and a wrong name says what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxsteer import contrast, hubvectors, library
from mlxsteer.errors import MlxsteerError, VectorError
from mlxsteer.vector import SteeringVector

KEY = "demo"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folders for the user's, the bundled and the Hub's vectors."""
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "bundled_dir", lambda key: tmp_path / "bundled" / key)
    monkeypatch.chdir(tmp_path)

    def pull(repo: str, name: str, key: str) -> Path:
        return made("hub").save(tmp_path / "hub" / f"{name}.safetensors")

    monkeypatch.setattr(hubvectors, "pull", pull)
    return tmp_path


def made(name: str) -> SteeringVector:
    return SteeringVector.from_arrays({1: np.arange(1.0, 5.0)}, name=name, n_layers=2)


class FakeModel:
    """Stands in for a model: extraction gives a vector that says so, and is counted."""

    key = KEY
    label = "a fake"

    def __init__(self) -> None:
        self.extracted: list[str] = []

    def extract(self, name: str) -> SteeringVector:
        self.extracted.append(name)
        return SteeringVector.from_arrays({1: np.ones(4)}, name=name, n_layers=2)


def origin(name: str, model: Any = None) -> str:
    return library.find_or_extract(name, model or FakeModel()).name


def test_a_path_then_the_users_then_the_bundled_then_the_contrast_set(folders):
    model = FakeModel()
    assert origin("terse", model) == "terse"
    assert model.extracted == ["terse"]
    (library.user_dir(KEY) / "terse.safetensors").unlink()
    made("bundled").save(library.bundled_dir(KEY) / "terse.safetensors")
    assert origin("terse", model) == "bundled"
    made("users").save(library.user_dir(KEY) / "terse.safetensors")
    assert origin("terse", model) == "users"
    made("file").save(folders / "terse.safetensors")
    assert origin("terse", model) == "users"  # a bare name is never a file by accident
    assert origin("./terse.safetensors", model) == "file"
    assert origin("terse.safetensors", model) == "file"
    assert origin(str(folders / "terse.safetensors"), model) == "file"
    assert model.extracted == ["terse"]


def test_a_hub_name_is_fetched_and_not_taken_for_a_path(folders):
    assert origin("someone/vectors:terse") == "hub"
    assert origin("someone/vectors.npz:terse.pt") == "hub"


def test_a_vector_extracted_on_the_spot_is_kept_and_said(capsys):
    model = FakeModel()
    assert origin("terse", model) == origin("terse", model) == "terse"
    assert model.extracted == ["terse"]
    assert "No vector 'terse' for a fake yet; extracting it" in capsys.readouterr().err


def test_another_models_vectors_are_not_found():
    made("terse").save(library.user_dir("other") / "terse.safetensors")
    assert library.available(KEY) == {}
    with pytest.raises(VectorError):
        library.find("terse", KEY)


@pytest.mark.parametrize(
    ("typed", "meant"), [("tersse", "terse"), ("cheerfull", "cheerful"), ("my-owm", "my-own")]
)
def test_an_unknown_name_says_what_is_near_and_where_to_look(typed, meant):
    library.save(made("my-own"), KEY)
    for find in (lambda: library.find(typed, KEY), lambda: origin(typed)):
        with pytest.raises(VectorError) as caught:
            find()
        assert f"Did you mean {meant!r}" in str(caught.value)
        assert "mlxsteer vectors list" in str(caught.value)


def test_a_broken_set_of_the_users_does_not_hide_the_error(monkeypatch):
    def broken() -> list[str]:
        raise MlxsteerError("unreadable")

    monkeypatch.setattr(contrast, "available", broken)
    with pytest.raises(VectorError, match="no vector or contrast set called 'x'"):
        library.find("x", KEY)


def test_a_missing_file_is_named():
    with pytest.raises(VectorError, match=r"missing\.safetensors"):
        library.find("./missing.safetensors", KEY)


def test_a_pickle_is_refused(folders):
    (folders / "v.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(VectorError, match=r"(?i)pickle"):
        library.find("v.pt", KEY)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "/x",
        "..",
        ".hidden",
        "\n",
        "a b",
        "a\nb",
        "x.safetensors",
        "x.gguf",
        "-x",
    ],
)
def test_a_name_that_could_leave_the_folder_or_not_be_found_again_is_refused(folders, name):
    before = sorted(folders.rglob("*"))
    with pytest.raises(VectorError, match="cannot be a vector's name"):
        library.save(made("fine"), KEY, name)
    assert sorted(folders.rglob("*")) == before


@pytest.mark.parametrize("name", ["terse", "terse-answer", "v1.5", "größe", "a_b", "2nd"])
def test_a_saved_name_is_found_again(name):
    library.save(made("anything"), KEY, name)
    assert library.find(name, KEY).name == "anything"
    assert list(library.available(KEY)) == [name]


@pytest.mark.parametrize(
    ("label", "key"),
    [
        ("demo", "demo"),
        ("mlx-community/Qwen3-4B", "mlx-community--Qwen3-4B"),
        ("/models/My Model", "My--Model"),
        ("./.", None),
        ("/", "model"),
        ("../..", None),
    ],
)
def test_a_models_key_is_one_safe_folder_name(label, key):
    found = library.model_key(label)
    assert key is None or found == key
    assert "/" not in found
    assert found not in ("", ".", "..")


def test_a_folders_key_is_its_own_name_wherever_it_is_called_from(folders):
    (folders / "models" / "mine").mkdir(parents=True)
    assert library.model_key("models/mine") == "mine"
    assert library.model_key(str(folders / "models/mine")) == "mine"


def test_plain_names_survive_the_steering_grammar():
    from mlxsteer.grammar import Term, format, parse

    for name in ("a, b", 'say "x"', "  ", "a:3", "terse + formal", "@all"):
        term = Term(library.plain_name(name), 2.0)
        assert parse(format([term])) == [term]


def test_bundled_vectors_lie_in_the_package(monkeypatch):
    monkeypatch.undo()
    assert library.bundled_dir(KEY).parent.name == "vectors"
