"""Commands that look at what is here (`doctor`, `models`), the `demo`, and every command's help."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

import mlxsteer
from mlxsteer.cli import COMMANDS, main
from mlxsteer.model import Model
from mlxsteer.models.hooks import Board
from mlxsteer.sites import check_sites, strength_zero_is_identical
from tests.chat_models import chat_folder, random_directions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(folder: Path) -> Model:
    return mlxsteer.load(str(folder))


@pytest.fixture
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No model, no vectors, no settings; returns the home folder."""
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLXSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


def run(*words: str) -> Result:
    result = CliRunner().invoke(main, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples?:\s+mlxsteer {name}", result.stdout)


def _commands(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    with click.Context(group) as context:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            yield (*path, name)
            if isinstance(command, click.Group):
                yield from _commands(command, (*path, name))


def _command_at(path: tuple[str, ...]) -> click.Command:
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    return command


@pytest.mark.parametrize("path", list(_commands(main, ())), ids=" ".join)
def test_every_option_is_explained_and_every_default_is_shown(path: tuple[str, ...]) -> None:
    result = run(*path, "--help")
    assert re.search(rf"Examples?:\s+mlxsteer {path[0]}", result.stdout)
    for option in _command_at(path).params:
        if isinstance(option, click.Option):
            assert option.help, f"{option.opts[0]} says nothing"
            if isinstance(option.default, int | float) and not option.is_flag:
                assert re.search(rf"default:\s+{option.default}\b", result.stdout), option.opts[0]


def test_the_group_lists_every_command() -> None:
    shown = run("--help").stdout
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in COMMANDS)


# --- sites --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "places"), [("llama", 12), ("gemma2", 12), ("qwen3_next", 12), ("mamba2", 8)]
)
def test_every_offered_site_responds(tmp_path: Path, family: str, places: int) -> None:
    model = mlxsteer.load(str(chat_folder(tmp_path / family, family)))
    checks = check_sites(model)
    assert len(checks) == places
    assert all(check.ok for check in checks)
    assert max(check.capture_error for check in checks) < 1e-4
    assert strength_zero_is_identical(model)


def test_sites_respond_in_half_precision(folder: Path) -> None:
    checks = check_sites(mlxsteer.load(str(folder), dtype="bfloat16"))
    assert all(check.ok for check in checks)


def lose_edits_at(monkeypatch: pytest.MonkeyPatch, layer: int, site: str) -> None:
    """At one place, the edit shows in what is read there, but the model goes on without it."""
    sound = Board.apply

    def apply(board: Board, at: int, where: str, x: mx.array) -> mx.array:
        edited = sound(board, at, where, x)
        return x if (at, where) == (layer, site) else edited

    monkeypatch.setattr(Board, "apply", apply)


def test_a_site_whose_edit_is_lost_is_found(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_edits_at(monkeypatch, 2, "attn_out")
    failed = [check for check in check_sites(model) if not check.ok]
    assert [(check.layer, check.site) for check in failed] == [(2, "attn_out")]


def test_a_site_that_adds_too_much_is_found(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Board.apply

    def twice(board: Board, layer: int, site: str, x: mx.array) -> mx.array:
        run = getattr(board._local, "run", None)
        if run and layer == 1 and site == "ffn_out" and (edit := run.edits.get((1, "ffn_out"))):
            x = edit(x)
        return sound(board, layer, site, x)

    monkeypatch.setattr(Board, "apply", twice)
    failed = [check for check in check_sites(model) if not check.ok]
    assert [(check.layer, check.site) for check in failed] == [(1, "ffn_out")]


def test_a_model_that_changes_under_strength_zero_is_found(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxsteer.edits import Stacker

    monkeypatch.setattr(
        Stacker, "edits", lambda *arguments: {(1, "residual"): lambda x: x * (1 + 2**-20)}
    )
    assert not strength_zero_is_identical(model)


# --- doctor -------------------------------------------------------------------------------------


def test_doctor_reports_a_model_whose_sites_respond(folder: Path, empty_machine: Path) -> None:
    result = run("doctor", "--model", str(folder))
    assert result.exit_code == 0, result.output
    for words in (
        f"mlxsteer {mlxsteer.__version__}",
        "ok         model: tiny: 4 layers, width 32",
        "ok         residual: 4 of 4 layers respond",
        "ok         attn_out: 4 of 4 layers respond",
        "ok         ffn_out: 4 of 4 layers respond",
        "ok         strength 0: the unsteered model, bit for bit",
    ):
        assert words in result.stdout


def test_doctor_says_which_sites_a_model_does_not_offer(
    tmp_path: Path, empty_machine: Path
) -> None:
    folder = chat_folder(tmp_path / "mamba2", "mamba2")
    result = run("doctor", "--model", str(folder), "--json")
    assert result.exit_code == 0
    details = {check["name"]: check["detail"] for check in json.loads(result.stdout)["checks"]}
    assert details["ffn_out"] == "no layer of this model offers this site"


def test_doctor_fails_when_a_site_does_not_respond(
    folder: Path, empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_edits_at(monkeypatch, 2, "residual")
    result = run("doctor", "--model", str(folder))
    assert result.exit_code == 1
    assert "FAILED     residual: 3 of 4 layers respond; not these: 2" in result.stdout


def test_doctor_fails_for_a_model_that_is_named_and_not_there(empty_machine: Path) -> None:
    result = run("doctor", "--model", "nosuch", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    [check] = report["checks"]  # told once, and nothing is tried after it
    assert "nosuch" in check["detail"]
    assert check["detail"] not in report["warnings"]
    assert not report["ok"]


@pytest.mark.parametrize("words", [["--no-model"], []])
def test_doctor_works_where_no_model_is(empty_machine: Path, words: list[str]) -> None:
    result = run("doctor", *words, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["checks"] == []
    assert report["memory_bytes"] > 0
    assert any("models pull demo" in warning for warning in report["warnings"])


# --- models -------------------------------------------------------------------------------------


def test_models_are_listed_with_sizes_and_the_default(folder: Path, empty_machine: Path) -> None:
    empty_machine.mkdir()
    settings = f"model: mine\naliases: {{mine: {folder}, far: someone/model}}\n"
    (empty_machine / "config.yaml").write_text(settings)
    listed = {
        row["name"]: row for row in json.loads(run("models", "list", "--json").stdout)["models"]
    }
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert listed["mine"] == {
        "name": "mine",
        "path": str(folder),
        "bytes": size,
        "default": True,
    }
    assert listed["demo"]["bytes"] is None
    shown = run("models", "list").stdout
    assert "not here yet: mlxsteer models pull demo" in shown
    assert re.search(r"^mine .*default", shown, re.MULTILINE)


def test_models_pull_prints_the_folder(folder: Path, empty_machine: Path) -> None:
    assert run("models", "pull", str(folder)).stdout.strip() == str(folder)
    result = run("models", "pull", "dmo")
    assert result.exit_code == 1
    assert "Did you mean 'demo'" in result.stderr


# --- demo ---------------------------------------------------------------------------------------


def test_demo_answers_in_three_ways(
    demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a random vector in terse's place, so that nothing is extracted."""
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path))
    model = mlxsteer.load("demo")
    random_directions(width=model.d_model, n_layers=model.n_layers, name="terse").save(
        tmp_path / "vectors" / "demo" / "terse.safetensors"
    )
    result = run("demo", "-p", "Why is the sky blue?", "--max-tokens", "6")
    assert result.exit_code == 0
    heads = re.findall(r"^== (\S+) \((\d+) words", result.stdout, re.MULTILINE)
    assert [head for head, _ in heads] == ["unsteered", "terse:3", "terse:-3"]
    unsteered = result.stdout.split("==")[2].strip()
    assert unsteered == model.generate("Why is the sky blue?", max_tokens=6).strip()
    assert int(heads[0][1]) == len(unsteered.split())
    assert "Next: mlxsteer chat" in result.stdout
