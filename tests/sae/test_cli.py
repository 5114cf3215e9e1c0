"""`mlxsteer sae` as it is typed, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlxsteer.cli import main
from mlxsteer.model import Model
from mlxsteer.sae import build, chats, folder, shelf
from mlxsteer.sae.corpus import Window
from tests.chat_models import WORDS

pytestmark = pytest.mark.usefixtures("own_folders")
FIXTURES = Path(__file__).parent.parent / "fixtures" / "sae"
SMALL = ["--features", "64", "--k", "4", "--batch", "64", "--epochs", "2", "--context", "16"]


def sae(*words: object) -> Result:
    result = CliRunner().invoke(main, ["sae", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    words = [WORDS[i] for i in rng.integers(6, 64, 1500)]
    path = tmp_path / "corpus.txt"
    path.write_text(" ".join(words))
    return path


def train(folder: Path, text: Path, *more: object) -> Result:
    return sae("train", "--model", folder, "--layer", 2, "--corpus", text, "--tokens", 1000,
               *SMALL, *more)  # fmt: skip


def test_train_keeps_a_dictionary_that_show_list_and_export_find(
    folder_of_tiny: Path, text: Path, tmp_path: Path
) -> None:
    done = train(folder_of_tiny, text)
    assert done.exit_code == 0, done.stderr
    assert "explained variance" in done.stdout
    assert "states to read: 1," in done.stderr  # the cost is said first
    name = "residual-2-batchtopk"
    shown = json.loads(sae("show", name, "--model", folder_of_tiny, "--json").stdout)
    assert (shown["layer"], shown["site"], shown["features"]) == (2, "residual", 64)
    assert 0 < shown["fit"]["explained_variance"] < 1
    assert shown["fit"]["l0"] == pytest.approx(4, abs=2)
    assert {"clean", "spliced", "zero", "mean", "recovered"} <= set(shown["splice"])
    assert name in sae("list", "--model", folder_of_tiny).stdout
    for form in ("saelens", "saelens5", "gemma-scope"):
        out = tmp_path / form
        assert sae("export", name, out, "--format", form, "--model", folder_of_tiny).exit_code == 0
        kept = shelf.load(name, shelf_key(folder_of_tiny))
        x = mx.random.normal((20, 32))
        np.testing.assert_allclose(folder.read(out).encode(x), kept.encode(x), atol=1e-4)
    assert not list((tmp_path / "cache" / "sae").rglob("states.bf16"))


def shelf_key(path: Path) -> str:
    from mlxsteer.library import model_key

    return model_key(str(path))


@pytest.fixture
def folder_of_tiny(folder: Path) -> Path:
    return folder


def test_what_it_was_trained_on_is_kept(folder_of_tiny: Path, text: Path, tmp_path: Path) -> None:
    assert train(folder_of_tiny, text, "--out", tmp_path / "sae").exit_code == 0
    windows = build.kept_windows(tmp_path / "sae")
    assert sum(window.kept for window in windows) >= 1000
    assert all(isinstance(window, Window) and len(window.tokens) <= 16 for window in windows)
    density = build.kept_density(tmp_path / "sae")
    assert density is not None
    assert density.sum() == pytest.approx(4, abs=2)  # activations per state


def test_an_interrupted_command_ends_as_the_whole_one(
    folder_of_tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(folder_of_tiny, text, "--out", tmp_path / "whole").exit_code == 0
    real = build.train

    def dies(*args: object, **options: object) -> object:
        if len(args) == 2:  # the steps that are taken to estimate the time
            return real(*args, **options)  # type: ignore[arg-type]
        real(*args, **{**options, "stop_after": 7})  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "train", dies)
    assert train(folder_of_tiny, text, "--out", tmp_path / "parts").exit_code == 130
    monkeypatch.setattr(build, "train", real)
    # Neither takes away what was done: one only asks, the other is refused.
    assert train(folder_of_tiny, text, "--restart", "--dry-run").exit_code == 0
    assert train(folder_of_tiny, text, "--restart", "--out", tmp_path / "whole").exit_code == 1
    again = train(folder_of_tiny, text, "--out", tmp_path / "parts")
    assert "Going on" in again.stderr
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes()
               for name in ("whole", "parts")]  # fmt: skip
    assert weights[0] == weights[1]


def test_dry_run_prints_the_cost_and_writes_nothing(
    folder_of_tiny: Path, text: Path, tmp_path: Path
) -> None:
    shown = json.loads(train(folder_of_tiny, text, "--dry-run", "--json").stdout)
    assert shown["tokens"] >= 1000
    assert shown["seen"] > 1500
    assert shown["buffer_bytes"] == shown["tokens"] * 32 * 2 + 6 * 4 * 32 * 64
    assert shown["reading_seconds"] > 0
    written = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and "sae" in p.parts]
    assert not written
    assert not (tmp_path / "home").exists()


def test_the_model_writes_chats_for_its_own_dictionary(
    folder_of_tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "ANSWER_TOKENS", 4)
    done = train(folder_of_tiny, text, "--self-chats", 4, "--out", tmp_path / "sae")
    assert done.exit_code == 0, done.stderr
    user = WORDS.index("<user>")
    asked = [w for w in build.kept_windows(tmp_path / "sae") if user in w.tokens]
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--layer", "99"], 1, "out of range"),
        (["--layer", "2", "--k", "64"], 2, "1 to 63"),
        (["--layer", "2", "--context", "99999999"], 1, "Give a smaller --context"),
        (["--layer", "2", "--epochs", "inf"], 2, "inf is no epochs"),
        (["--layer", "2", "--batch", "5000"], 1, "fewer than one batch"),
        (["--layer", "2", "--name", "../up"], 1, "cannot be a dictionary's name"),
        (["--layer", "2", "--corpus", "nowhere.txt"], 1, "cannot be read"),
    ],
)
def test_train_refuses_in_one_line(
    folder_of_tiny: Path, text: Path, words: list[str], status: int, message: str
) -> None:
    done = train(folder_of_tiny, text, *words)
    assert done.exit_code == status
    assert message in done.stderr.splitlines()[-1]


def test_train_replaces_nothing(folder_of_tiny: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    done = train(folder_of_tiny, text, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "is there already" in done.stderr


def test_import_checks_the_model_and_keeps_the_place(folder_of_tiny: Path, tmp_path: Path) -> None:
    alien = sae("import", FIXTURES / "standard", "--model", folder_of_tiny)
    assert alien.exit_code == 1
    assert "width 8" in alien.stderr
    weights = {
        "W_enc": np.ones((32, 6), np.float32),
        "W_dec": np.ones((6, 32), np.float32),
        "b_enc": np.zeros(6, np.float32),
        "b_dec": np.zeros(32, np.float32),
        "threshold": np.ones(6, np.float32),
    }
    np.savez(tmp_path / "params.npz", **weights)  # type: ignore[arg-type]
    without = sae("import", tmp_path / "params.npz", "--model", folder_of_tiny)
    assert "Add --layer" in without.stderr
    place = ["--layer", 3, "--name", "theirs", "--model", folder_of_tiny]
    assert sae("import", tmp_path / "params.npz", *place).exit_code == 0
    kept = shelf.load("theirs", shelf_key(folder_of_tiny))
    assert (kept.layer, kept.site, kept.architecture) == (3, "residual", "jumprelu")
    assert sae("import", tmp_path / "params.npz", *place).exit_code == 1
    assert sae("import", tmp_path / "params.npz", *place, "--force").exit_code == 0


def test_an_unknown_name_is_met_with_a_near_one(folder_of_tiny: Path, tiny: Model) -> None:
    kept = shelf.place_for("residual-2", shelf_key(folder_of_tiny))
    folder.write(folder.read(FIXTURES / "standard"), kept)
    done = sae("show", "residul-2", "--model", folder_of_tiny)
    assert done.exit_code == 1
    assert "Did you mean 'residual-2'?" in done.stderr
