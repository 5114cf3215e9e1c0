"""Names find the model they mean: folders, aliases, settings, and the Hub through a stand-in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from mlxsteer.errors import ModelError
from mlxsteer.models import demo
from mlxsteer.models.names import resolve_model
from tests.tiny import edit_json, make_folder


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty cache and home folders, and an empty working directory."""
    for name in ("CACHE", "HOME"):
        monkeypatch.setenv(f"MLXSTEER_{name}", str(tmp_path / name.lower()))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "tiny-llama")


def write_settings(homes: Path, text: str) -> None:
    (homes / "home").mkdir(exist_ok=True)
    (homes / "home" / "config.yaml").write_text(text)


def make_v4_folder(homes: Path, name: str = "DeepSeek-V4-Flash-mlx") -> Path:
    path = homes / "cache" / "models" / name
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "deepseek_v4"}')
    return path


def test_resolving_does_not_import_mlx():
    code = (
        "import sys; from mlxsteer.models.names import resolve_model; resolve_model('.');"
        "sys.exit('mlx.core' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_folder_is_itself(homes, folder):
    found = resolve_model(str(folder))
    assert (found.path, found.label, found.alias) == (folder, "tiny-llama", None)


def test_without_a_name_the_demo_is_used_and_said(homes, monkeypatch):
    monkeypatch.setattr(demo, "demo_path", demo.demo_folder)
    found = resolve_model(None)
    assert found.alias == "demo"
    assert "demo model" in found.why


def test_without_a_name_a_converted_v4_flash_comes_before_the_demo(homes):
    path = make_v4_folder(homes)
    found = resolve_model(None)
    assert (found.path, found.alias) == (path, "v4-flash")
    assert str(path) in found.why


def test_without_a_name_the_users_default_comes_first(homes, folder):
    make_v4_folder(homes)
    write_settings(homes, f"model: {folder}\n")
    found = resolve_model(None)
    assert found.path == folder
    assert "config.yaml" in found.why


def test_users_aliases_name_folders(homes, folder):
    write_settings(homes, f"aliases:\n  v4-flash: {folder}\n  mine: demo\n")
    assert resolve_model("v4-flash").path == folder
    assert resolve_model(None).path == folder


def test_v4_flash_without_a_folder_says_to_convert(homes):
    with pytest.raises(ModelError, match="mlxsteer convert"):
        resolve_model("v4-flash")


def test_an_unfinished_v4_folder_is_not_found(homes):
    (make_v4_folder(homes) / "config.json").write_text("{")
    with pytest.raises(ModelError, match="mlxsteer convert"):
        resolve_model("v4-flash")


def test_demo_is_not_fetched_when_downloads_are_off(homes):
    with pytest.raises(ModelError, match="models pull demo"):
        resolve_model("demo", allow_download=False)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("dmeo", "'demo'"), ("v4flash", "'v4-flash'"), ("./tiny-lama", "'tiny-llama'")],
)
def test_typos_get_near_matches(homes, typed, meant):
    Path("tiny-llama").mkdir()
    with pytest.raises(ModelError, match=f"Did you mean {meant}"):
        resolve_model(typed)


def test_a_file_points_to_its_folder(homes, folder):
    with pytest.raises(ModelError, match="Give the model's folder"):
        resolve_model(str(folder / "config.json"))


@pytest.mark.parametrize("text", ["model: [", "- demo\n", "aliases: demo\n"])
def test_broken_settings_are_named(homes, text):
    write_settings(homes, text)
    with pytest.raises(ModelError, match=r"config\.yaml"):
        resolve_model(None)


# The Hub, through a stand-in for the client's one function


@pytest.fixture
def repo(homes, folder, monkeypatch) -> Path:
    """The files of a repo, and a `snapshot_download` that copies what is asked for."""
    (folder / "modeling.py").write_text("")
    (folder / "pytorch_model.bin").write_bytes(b"")
    snapshot = homes / "hub" / "snapshots" / "0123abcd"

    def download(repo, *, allow_patterns, local_files_only):
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


def test_hub_repo_comes_without_code_or_pickles(repo):
    found = resolve_model("someone/tiny-llama")
    assert (found.label, found.revision) == ("someone/tiny-llama", "0123abcd")
    names = {file.name for file in found.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"modeling.py", "pytorch_model.bin"} & names


def test_hub_repo_that_wants_code_is_refused_before_its_weights_come(repo, homes):
    edit_json(repo / "config.json", auto_map={"AutoModel": "modeling.X"})
    with pytest.raises(ModelError, match="never runs code"):
        resolve_model("someone/tiny-llama")
    assert not (homes / "hub/snapshots/0123abcd/model.safetensors").exists()


def test_hub_repo_of_a_refused_architecture_is_not_fetched(repo, homes):
    edit_json(repo / "config.json", model_type="deepseek_v41")
    with pytest.raises(ModelError, match=r"V4\.1"):
        resolve_model("someone/DeepSeek-V4.1")
    assert not (homes / "hub/snapshots/0123abcd/model.safetensors").exists()


def test_hub_repo_of_pickles_is_refused(repo):
    (repo / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors"):
        resolve_model("someone/tiny-llama")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (hub_errors.RepositoryNotFoundError, "no repo of that name"),
        (hub_errors.GatedRepoError, "hf auth login"),
        (hub_errors.LocalEntryNotFoundError, "cannot be reached"),
        (hub_errors.IncompleteSnapshotError, "cannot be reached"),
        (OSError, "Cannot fetch"),
    ],
)
def test_hub_failures_say_what_to_do(homes, monkeypatch, kind, message):
    def fail(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        resolve_model("someone/model")


def test_hub_repo_that_is_not_here_names_the_pull_command(homes):
    with pytest.raises(ModelError, match="mlxsteer models pull someone/model"):
        resolve_model("someone/model", allow_download=False)
