"""Fixtures that several test files share. The demo model is fetched once into the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Spinning BLAS threads slow everything where cores are shared. Before anything loads a BLAS.
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import mlxsteer  # noqa: E402, F401  before mlx, for its fast BLAS
from mlxsteer.models import demo  # noqa: E402


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The converted demo model's folder."""
    return demo.demo_path(progress=False)


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF that the demo model was converted from."""
    return demo.fetch_gguf(tmp_path_factory.mktemp("gguf"))
