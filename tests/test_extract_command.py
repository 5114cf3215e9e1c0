"""`mlxsteer extract`: what it keeps and prints, and the errors of what is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlxsteer import files, reading
from mlxsteer.cli import main
from mlxsteer.vector import SteeringVector

pytestmark = pytest.mark.usefixtures("own_folders")


YAML = """
description: Short against long.
labels: {positive: short, negative: long}
combine: append
questions: [w10 w11, w12 w13, w14 w15, w16 w17]
positive: [w30 w31, w32]
negative: [w40, w41 w42]
held_out: [w50 w51, w52 w53]
metric: {name: words, direction: down}
"""


@pytest.fixture
def set_file(tmp_path: Path) -> Path:
    path = tmp_path / "short.yaml"
    path.write_text(YAML)
    return path


def test_the_command_keeps_the_vector_and_says_what_the_figures_do_not(folder, set_file):
    result = CliRunner().invoke(main, ["extract", str(set_file), "--model", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split("  ")[0] == "layer"
    assert "held-out AUROC" in result.stdout
    assert "not that the vector steers" in result.stdout
    assert SteeringVector.load(files.home_dir() / "vectors/tiny/short.safetensors").layers == (2,)


def test_both_positions_are_kept_under_two_names_and_json_is_json(folder, set_file, tmp_path):
    out = tmp_path / "mine.safetensors"
    arguments = ["extract", str(set_file), "--model", str(folder), "--position", "both"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [value["name"] for value in values] == ["short", "short-answer"]
    positions = [value["extract_position"] for value in values]
    assert positions == ["last_prompt", "answer_mean"]
    assert [Path(value["path"]).name for value in values] == [
        "mine.safetensors",
        "mine-answer.safetensors",
    ]
    assert all(Path(value["path"]).is_file() for value in values)
    assert values[0]["layer_reports"][0]["auroc"] <= 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-set"], 1, "No contrast set is named 'no-such-set'"),
        (["terce"], 1, "Did you mean 'terse'"),
        (["terse", "--layers", "9"], 2, "Layer 9 is out of range"),
        (["terse", "--layers", "x"], 2, "no layer"),
        (["terse", "--method", "meen"], 2, "meen"),
    ],
)
def test_the_commands_errors_are_one_message(folder, arguments, code, message):
    result = CliRunner().invoke(main, ["extract", *arguments, "--model", str(folder)])
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_vectors_bad_name_fails_before_the_work(folder, set_file, monkeypatch):
    monkeypatch.setattr(reading, "_run_group", None)
    result = CliRunner().invoke(
        main, ["extract", str(set_file), "--model", str(folder), "--name", "../x"]
    )
    assert result.exit_code == 1
    assert "cannot be a vector's name" in result.stderr
