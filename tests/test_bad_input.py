"""Bad input to the real commands: one line that says what to do, exit 1 or 2, nothing lost."""

from __future__ import annotations

import errno
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlxsteer.cli import main
from mlxsteer.vector import SteeringVector
from tests.chat_models import chat_folder, random_directions

CONTRAST_SET = """\
description: Short against long.
labels: {positive: short, negative: long}
combine: append
questions: [w3, w4, w5, w6]
positive: [w10 w11]
negtive: [w12 w13]
metric: {name: words}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own that holds the vector `push` of the tiny model."""
    home = tmp_path / "home"
    monkeypatch.setenv("MLXSTEER_HOME", str(home))
    monkeypatch.setenv("MLXSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    random_directions().save(home / "vectors" / "tiny" / "push.safetensors")
    return home


def chat(folder: Path, *arguments: str, stdin: str | None = None) -> Result:
    command = ["chat", "--model", str(folder), "--max-tokens", "4", *arguments]
    return CliRunner().invoke(main, command, input=stdin)


def expect_error(result: Result, code: int, *words: str, lines: int = 1) -> None:
    """Exit status `code`, an error of that many lines with `words` in it, and no result."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    errors = result.stderr[result.stderr.index("Error: ") :].strip()
    assert len(errors.splitlines()) == lines, errors
    for word in words:
        assert word in errors


def snapshot(folder: Path) -> dict[str, bytes]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file): file.read_bytes() for file in files}


# --- names and grammar --------------------------------------------------------------------------


def test_an_unknown_vector_names_near_ones(folder: Path, home: Path) -> None:
    result = chat(folder, "--steer", "pusj:3", "-p", "w3")
    expect_error(result, 1, "'pusj'", "Did you mean 'push'", "mlxsteer vectors list")


@pytest.mark.parametrize("command", ["calibrate", "vectors show"])
def test_commands_that_take_a_vector_name_near_ones(folder: Path, home: Path, command: str) -> None:
    words = [*command.split(), "pusj", "--model", str(folder)]
    expect_error(CliRunner().invoke(main, words), 1, "'pusj'", "Did you mean 'push'")


def test_an_unknown_contrast_set_names_near_ones(folder: Path, home: Path) -> None:
    result = CliRunner().invoke(main, ["extract", "ters", "--model", str(folder)])
    expect_error(result, 1, "'ters'", "'terse'")


def test_an_unknown_model_names_near_ones(home: Path) -> None:
    result = CliRunner().invoke(main, ["chat", "--model", "dem", "-p", "w3"])
    expect_error(result, 1, "'dem'", "Did you mean 'demo'")


def test_an_unknown_command_names_near_ones() -> None:
    result = CliRunner().invoke(main, ["chatt"])
    assert result.exit_code == 2
    assert "'chatt'" in result.stderr
    assert "'chat'" in result.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("push:loud", "'loud' is not a strength"),
        ("push:3@anser", "Did you mean 'answer'"),
        ("push:3,,", "a term is missing"),
        ('"push:3', "never closed"),
        ("push:1e999", "not a strength"),
    ],
)
def test_malformed_steering_points_at_the_character(home: Path, text: str, says: str) -> None:
    """Before any model is loaded: the folder here does not exist."""
    result = chat(Path("nowhere"), "--steer", text, "-p", "w3")
    expect_error(result, 2, says, "⟨here⟩", "Example: --steer")


def test_a_malformed_option_is_wrong_usage(folder: Path, home: Path) -> None:
    for words in (["--temp", "-1"], ["--top-p", "0"], ["--max-tokens", "0"], ["--seed", "x"]):
        assert chat(folder, "-p", "w3", *words).exit_code == 2


def test_an_empty_question_is_wrong_usage(folder: Path, home: Path) -> None:
    expect_error(chat(folder, "-p", " "), 2, "question is empty")
    expect_error(chat(folder, "-p", "-", stdin=""), 2, "question is empty")


def test_json_without_a_question_is_wrong_usage(folder: Path, home: Path) -> None:
    expect_error(chat(folder, "--json", stdin="w3\n"), 2, "add -p")


def test_thinking_of_a_model_that_cannot_is_wrong_usage(folder: Path, home: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    plain = home / "plain"
    plain.mkdir(parents=True)
    for file in folder.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = (plain / "tokenizer.json").read_text().replace("think>", "thonk>")
    (plain / "tokenizer.json").write_text(vocabulary)
    expect_error(chat(plain, "--think", "-p", "w3"), 2, "no thinking mode")


# --- vectors ------------------------------------------------------------------------------------


def test_a_layer_out_of_range_is_named(folder: Path, home: Path) -> None:
    deep = SteeringVector.from_arrays({40: np.ones(32)}, n_layers=41, name="deep")
    path = deep.save(home / "deep.safetensors")
    result = chat(folder, "--steer", f"{path}:1r", "-p", "w3")
    expect_error(result, 1, "41 layers", "layers 0 to 3", "mlxsteer extract deep")


@pytest.mark.parametrize(
    ("layers", "code", "says"),
    [("2-99", 2, "layers 0 to 3"), ("3-1", 2, "1-3"), ("two", 2, "'two' is no layer")],
)
def test_layers_to_extract_are_checked(
    folder: Path, home: Path, layers: str, code: int, says: str
) -> None:
    words = ["extract", "terse", "--model", str(folder), "--layers", layers]
    expect_error(CliRunner().invoke(main, words), code, says)


def test_a_vector_of_another_width_is_refused(folder: Path, home: Path) -> None:
    wide = SteeringVector.from_arrays({1: np.ones(48)}, n_layers=4, name="wide")
    path = wide.save(home / "wide.safetensors")
    result = chat(folder, "--steer", f"{path}:1r", "-p", "w3")
    expect_error(result, 1, "width 48", "32", "another model")


@pytest.mark.parametrize("left", [0, 5, 100, 700])
def test_a_truncated_vector_is_refused(folder: Path, home: Path, left: int) -> None:
    path = home / "vectors" / "tiny" / "push.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    result = chat(folder, "--steer", "push:1r", "-p", "w3")
    expect_error(result, 1, "push.safetensors")


def test_a_vector_with_a_changed_byte_is_refused(folder: Path, home: Path) -> None:
    path = home / "vectors" / "tiny" / "push.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)
    expect_error(chat(folder, "--steer", "push:1r", "-p", "w3"), 1, "push.safetensors")


class Evil:
    """Unpickling it would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["evil.pt", "evil.pkl", "evil.safetensors", "evil.bin"])
@pytest.mark.parametrize("command", ["chat", "vectors import"])
def test_a_pickle_is_refused_and_not_run(folder: Path, home: Path, name: str, command: str) -> None:
    trace, evil = home / "ran", home / name
    evil.write_bytes(pickle.dumps(Evil(trace)))
    if command == "chat":
        result = chat(folder, "--steer", f"{evil}:1r", "-p", "w3")
    else:
        words = [*command.split(), str(evil), "--name", "evil", "--model", str(folder)]
        result = CliRunner().invoke(main, words)
    expect_error(result, 1, name)
    assert not trace.exists()


# --- contrast sets and models ---------------------------------------------------------------------


def test_a_typo_in_a_contrast_set_is_shown_with_its_line(folder: Path, home: Path) -> None:
    (home / "short.yaml").write_text(CONTRAST_SET)
    words = ["extract", str(home / "short.yaml"), "--model", str(folder)]
    expect_error(CliRunner().invoke(main, words), 1, "short.yaml:6", "'negtive'", "'negative'")


def test_broken_yaml_is_shown_with_its_line(folder: Path, home: Path) -> None:
    (home / "short.yaml").write_text("description: [a\nlabels: b\n")
    words = ["extract", str(home / "short.yaml"), "--model", str(folder)]
    expect_error(CliRunner().invoke(main, words), 1, "short.yaml:2", "not valid YAML")


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_model_folder_that_lacks_a_file_says_which(folder: Path, home: Path, file: str) -> None:
    broken = home / "broken"
    broken.mkdir()
    for part in folder.iterdir():
        if part.name != file:
            (broken / part.name).write_bytes(part.read_bytes())
    expect_error(chat(broken, "-p", "w3"), 1, str(broken), file.removesuffix(".safetensors"))


def test_a_prompt_beyond_the_context_is_refused(folder: Path, home: Path) -> None:
    expect_error(chat(folder, "-p", "w3 " * 300), 1, "303 tokens", "256")


def test_a_prompt_beyond_the_context_does_not_end_a_piped_chat(folder: Path, home: Path) -> None:
    result = chat(folder, stdin=f"w3\n{'w3 ' * 300}\nw5\n")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.count("Error: ") == 1


# --- files that cannot be written -----------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is written reaches the disk."""

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mlxsteer.files.os.fsync", fail)


def test_a_full_disk_keeps_the_saved_chat(
    folder: Path, home: Path, request: pytest.FixtureRequest
) -> None:
    assert chat(folder, "-p", "w3", "--save", "chat.json").exit_code == 0
    before = snapshot(home.parent)
    request.getfixturevalue("full_disk")
    result = chat(folder, "-p", "w4", "--load", "chat.json", "--save", "chat.json")
    assert result.exit_code == 1
    assert result.stdout.strip()  # the answer itself is not lost
    assert "Error: Cannot write chat.json: No space left on device" in result.stderr
    assert snapshot(home.parent) == before


def test_a_full_disk_does_not_end_a_piped_chat(folder: Path, home: Path, full_disk: None) -> None:
    result = chat(folder, "--save", "chat.json", stdin="w3\nw4\n/stats\n")
    assert result.exit_code == 1
    assert result.stderr.count("No space left") == 2
    assert "prompt" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["vectors", "combine", "2*push", "push", "--force", "--model", "tiny"],
        ["vectors", "export", "push", "push.gguf", "--model", "tiny"],
    ],
)
def test_a_full_disk_keeps_the_vectors(home: Path, full_disk: None, words: list[str]) -> None:
    before = snapshot(home)
    expect_error(CliRunner().invoke(main, words), 1, "Cannot write", "No space left on device")
    assert snapshot(home) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_results_that_a_full_disk_does_not_take_are_an_error(folder: Path, home: Path) -> None:
    words = [sys.executable, "-m", "mlxsteer", "models", "pull", str(folder)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: stdout: No space left on device.")
    assert len(done.stderr.splitlines()) == 1


def test_save_refuses_a_file_that_is_no_chat(folder: Path, home: Path) -> None:
    Path("notes.txt").write_text("mine")
    result = chat(folder, "-p", "w3", "--save", "notes.txt")
    assert result.exit_code == 1
    assert "not a saved chat" in result.stderr
    assert Path("notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 9}', "\x00\x01"])
def test_a_file_that_is_no_chat_cannot_be_loaded(folder: Path, home: Path, content: str) -> None:
    Path("chat.json").write_text(content)
    expect_error(
        chat(folder, "-p", "w3", "--load", "chat.json"), 1, "chat.json is not a saved chat"
    )


def test_a_chat_that_is_not_there_cannot_be_loaded(folder: Path, home: Path) -> None:
    expect_error(chat(folder, "-p", "w3", "--load", "gone.json"), 1, "no file gone.json")
