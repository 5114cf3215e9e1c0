"""Claims about `vectors compare` and `vectors lens`, run through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlxsteer import library
from mlxsteer.cli import main
from mlxsteer.formats import export_file
from mlxsteer.vector import SteeringVector
from tests.chat_models import WORDS, random_directions

D, LAYERS, MODEL = 16, 6, "tiny"
AXIS = np.eye(D, dtype=np.float32)

pytestmark = pytest.mark.usefixtures("own_folders")


def run(*words: str, exits: int = 0) -> Result:
    result = CliRunner().invoke(main, ["vectors", *words], catch_exceptions=False)
    assert result.exit_code == exits, result.output
    return result


def made(name: str, cosine: float, layers: tuple[int, ...] = (2, 3), **fields) -> SteeringVector:
    """A vector at that cosine from the first axis, on every layer that it has."""
    row = np.float32(cosine) * AXIS[0] + np.float32(np.sqrt(1 - cosine**2)) * AXIS[1]
    return SteeringVector(name, dict.fromkeys(layers, row), LAYERS, **fields)


def keep(name: str, cosine: float, **fields) -> SteeringVector:
    vector = made(name, cosine, **fields)
    library.save(vector, MODEL)
    return vector


# --- compare --------------------------------------------------------------------------------------


def test_compare_prints_the_matrix_of_all_vectors_of_a_model() -> None:
    for name, cosine in (("a", 1), ("b", 0.6), ("c", -0.8)):
        keep(name, cosine)
    keep("far", 1, layers=(5,))
    lines = run("compare", "--model", MODEL).stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["a", "b", "c", "far"],
        ["a", "1.00", "0.60", "-0.80", "-"],
        ["b", "0.60", "1.00", "0.00", "-"],
        ["c", "-0.80", "0.00", "1.00", "-"],
        ["far", "-", "-", "-", "1.00"],
        "Most alike: a and b 0.60; b and c 0.00; a and c -0.80".split(),
        "Most opposed: a and c -0.80; b and c 0.00; a and b 0.60".split(),
    ]


def test_compare_takes_names_files_and_folders(tmp_path: Path) -> None:
    keep("a", 1)
    folder = tmp_path / "others"
    made("b", 0.6).save(folder / "b.safetensors")
    made("a", -0.8).save(folder / "a.safetensors")
    export_file(
        made("c", 0, magnitude=np.ones(LAYERS, np.float32)),
        folder / "c.gguf",
        strength=1,
        warn=print,
    )
    (folder / "notes.txt").write_text("not a vector")
    words = ("compare", "a", str(folder), "--model", MODEL, "--json", "--per-layer")
    found = json.loads(run(*words).stdout)
    assert found["vectors"] == ["a", str(folder / "a.safetensors"), "b", "c"]
    means = {(pair["a"], pair["b"]): pair["mean"] for pair in found["pairs"]}
    assert len(means) == 6
    assert means["a", "b"] == pytest.approx(0.6)
    assert means["a", str(folder / "a.safetensors")] == pytest.approx(-0.8)
    assert means["a", "c"] == pytest.approx(0, abs=1e-6)
    assert found["pairs"][0]["cosines"] == pytest.approx({"2": -0.8, "3": -0.8})


def test_compare_per_layer_has_a_column_for_every_layer() -> None:
    keep("a", 1)
    keep("b", 0.6, layers=(3, 4))
    lines = run("compare", "a", "b", "--model", MODEL, "--per-layer").stdout.splitlines()
    assert lines[-2].split() == ["3"]
    assert lines[-1].split() == ["a", "b", "0.60"]


def test_many_vectors_are_numbered() -> None:
    for index in range(9):
        keep(f"a-long-name-{index}", index / 10)
    head, first, *_ = run("compare", "--model", MODEL).stdout.splitlines()
    assert head.split() == [str(index) for index in range(1, 10)]
    assert first.split()[:2] == ["1", "a-long-name-0"]


def test_compare_refuses_what_has_no_angle() -> None:
    keep("a", 1)
    wide = SteeringVector("wide", {2: np.eye(9, dtype=np.float32)[0]}, LAYERS)
    library.save(wide, MODEL)
    text = run("compare", "a", "wide", "--model", MODEL, exits=1).stderr
    assert "width 16" in text
    assert "9" in text
    assert "there is 1" in run("compare", "a", "--model", MODEL, exits=2).stderr
    assert "there are none" in run("compare", "--model", "another", exits=2).stderr
    assert "'b'" in run("compare", "a", "b", "--model", MODEL, exits=1).stderr


def test_vectors_of_different_models_are_compared_with_a_warning() -> None:
    keep("a", 1, model={"base_model": "one/model"})
    keep("b", 0.6, model={"base_model": "another/model"})
    assert "different models" in run("compare", "--model", MODEL).stderr


def test_a_damaged_file_among_all_vectors_is_left_out_and_named() -> None:
    keep("a", 1)
    keep("b", 0.6)
    (library.user_dir(MODEL) / "broken.safetensors").write_bytes(b"broken")
    result = run("compare", "--model", MODEL)
    assert "broken is left out" in result.stderr
    assert result.stdout.splitlines()[0].split() == ["a", "b"]


# --- lens -----------------------------------------------------------------------------------------


@pytest.fixture
def push(folder: Path) -> SteeringVector:
    vector = random_directions()
    library.save(vector, library.model_key(str(folder)))
    return vector


def test_lens_prints_tokens_in_quotes_with_their_scores(folder: Path, push) -> None:
    words = ("lens", "push", "--model", str(folder), "--top", "2")
    lines = run(*words).stdout.splitlines()
    (reading,) = json.loads(run(*words, "--json").stdout)["readings"]
    assert lines[0].split() == ["promotes", "score", "suppresses", "score"]
    assert len(lines) == 3
    best, worst = reading["promoted"][0], reading["suppressed"][0]
    assert best["text"] == WORDS[best["token"]]
    cells = [f'"{best["text"]}"', f"{best['score']:+.1f}"]
    cells += [f'"{worst["text"]}"', f"{worst['score']:+.1f}"]
    assert lines[1].split() == cells


def test_lens_of_several_layers_has_a_line_for_each(folder: Path, push) -> None:
    words = ("lens", "push", "--model", str(folder), "--layer", "1-2", "--top", "3")
    lines = run(*words).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "1", "2"]
    assert lines[1].count('"') == 12
    found = json.loads(run(*words, "--json").stdout)
    assert [reading["layer"] for reading in found["readings"]] == [1, 2]


def test_lens_refuses_layers_without_a_direction(folder: Path, push) -> None:
    text = run("lens", "push", "--model", str(folder), "--layer", "3", exits=2).stderr
    assert "no direction at layer 3; it has one at 1, 2" in text
