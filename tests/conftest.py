"""Fixtures that several test files share. The demo model is fetched once into the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Spinning BLAS threads slow everything where cores are shared. Before anything loads a BLAS.
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import mlxsteer  # noqa: E402  before mlx, for its fast BLAS
from mlxsteer.model import Model  # noqa: E402
from mlxsteer.models import demo  # noqa: E402
from tests.chat_models import chat_folder  # noqa: E402


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The converted demo model's folder."""
    return demo.demo_path(progress=False)


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF that the demo model was converted from."""
    return demo.fetch_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(autouse=True)
def no_vectors_of_the_user(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody keeps in their own home must not decide a test."""
    if "MLXSTEER_HOME" not in os.environ:
        monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty home and cache folders, for `pytest.mark.usefixtures`."""
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLXSTEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that can chat."""
    return chat_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Model:
    """The model of `folder`, loaded."""
    return mlxsteer.load(str(folder))
