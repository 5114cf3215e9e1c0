"""`convert verify` finds what is wrong with a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxsteer.convert import reader
from mlxsteer.convert.sources import LocalSource
from mlxsteer.convert.verify import verify
from tests.convert.conftest import TINY, run


@pytest.fixture
def folder(converted: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted("lossless"), tmp_path / "copy"))


def flip(path: Path, from_end: int) -> None:
    data = bytearray(path.read_bytes())
    data[-from_end] ^= 1
    path.write_bytes(data)


def test_a_lossless_folder_is_bit_equal_to_its_source(folder: Path) -> None:
    report = verify(folder, LocalSource(TINY), everything=True)
    assert report.ok
    assert report.hashed == report.files == 7
    # 102 official matrices, wo_a taken apart into 2 groups in each of 5 layers, embed and head
    assert report.exact == 102 + 5 + 2
    assert report.errors == {}


def test_tensors_longer_than_a_block_of_copying_are_equal_to_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash layers' int64 tables among them, which become int32."""
    monkeypatch.setattr(reader, "STREAM_BYTES", 1000)
    run(TINY, tmp_path / "out")
    assert verify(tmp_path / "out", LocalSource(TINY), everything=True).ok


@pytest.mark.parametrize("recipe", ["q3", "q2"])
def test_a_smaller_folder_reports_the_errors_that_were_recorded(
    recipe: str, converted: Callable[[str], Path]
) -> None:
    report = verify(converted(recipe), LocalSource(TINY), everything=True)
    recorded = json.loads((converted(recipe) / "conversion.json").read_text())["errors"]
    assert report.ok
    assert report.errors.keys() == recorded.keys()
    for kind, error in report.errors.items():
        assert error == pytest.approx(recorded[kind]["error"], rel=1e-3)


def test_a_changed_byte_is_found_by_its_hash(folder: Path) -> None:
    flip(folder / "model-00002-of-00007.safetensors", 1000)
    (problem,) = verify(folder, everything=True).problems
    assert "model-00002-of-00007.safetensors has changed" in problem


def test_a_sample_hashes_four_files(folder: Path) -> None:
    assert verify(folder).hashed == 4


def test_a_changed_weight_is_found_against_the_source_even_without_hashes(folder: Path) -> None:
    shard = folder / "model-00002-of-00007.safetensors"
    flip(shard, 5000)
    from mlxsteer.convert.shard_file import file_sha256

    record = json.loads((folder / "conversion.json").read_text())
    record["shards"][shard.name]["sha256"] = file_sha256(shard)
    (folder / "conversion.json").write_text(json.dumps(record))
    report = verify(folder, LocalSource(TINY), everything=True)
    assert ["differs from the source" in p for p in report.problems] == [True]


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "model-00004-of-00007.safetensors").unlink()
    assert "model-00004-of-00007.safetensors" in verify(folder).problems[0]


def test_a_config_that_lies_about_a_format_is_found(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["model.layers.1.attn.wkv"]["bits"] = 4
    del config["quantization"]["model.layers.0.attn.wkv"]
    (folder / "config.json").write_text(json.dumps(config))
    problems = verify(folder).problems
    assert len(problems) == 2
    assert "model.layers.0.attn.wkv" in problems[0]
    assert "model.layers.1.attn.wkv" in problems[1]


def test_a_folder_without_a_record_says_that_hashes_are_unknown(folder: Path) -> None:
    (folder / "conversion.json").unlink()
    assert "hashes are not known" in verify(folder).problems[0]


def test_an_official_folder_is_not_a_converted_one() -> None:
    assert not verify(TINY).ok
