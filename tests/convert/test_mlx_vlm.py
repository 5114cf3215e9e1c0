"""Exchange with mlx-vlm, where it is installed: its folders in ours, ours in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.convert import mlx_vlm_peer, reference
from tests.convert.conftest import run
from tests.convert.golden import our_errors

pytest.importorskip("mlx_vlm")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mlx_vlm_peer.convert_tiny(tmp_path_factory.mktemp("vlm"))


def test_our_lossless_folder_gives_the_golden_logits_in_mlx_vlm(
    converted: Callable[[str], Path],
) -> None:
    assert mlx_vlm_peer.their_errors(converted("lossless")).max() < 1e-4


def test_their_folder_gives_the_golden_logits_in_our_module(theirs: Path) -> None:
    assert our_errors(theirs).max() < 1e-4


def test_their_folder_converts_to_the_bytes_of_the_official_one(
    theirs: Path, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    run(theirs, tmp_path / "out")
    expected = reference.load_folder(converted("lossless"))
    for name, tensor in reference.load_folder(tmp_path / "out").items():
        np.testing.assert_array_equal(tensor, expected[name])
