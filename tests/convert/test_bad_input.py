"""Bad input: one line that says what, why and what to do; nothing written, nothing lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mlxsteer.convert import source_check, space
from mlxsteer.convert.checkpoint import safe_name
from mlxsteer.convert.errors import ConvertError
from tests.convert.conftest import run

WEIGHTS = "model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(source: Path, out: Path) -> str:
    """Convert, expect refusal; the source is untouched and no model file exists. The message."""
    before = contents(source)
    with pytest.raises(ConvertError) as caught:
        run(source, out)
    message = str(caught.value)
    assert "\n" not in message
    assert contents(source) == before
    assert not (out / "config.json").exists()
    assert not [p for p in out.rglob("*") if "partial" in p.name]
    return message


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def poke(folder: Path, tensor: str, value: int) -> None:
    """Overwrite the first byte of a tensor."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
    data[8 + length + begin] = value
    (folder / WEIGHTS).write_bytes(data)


@pytest.mark.parametrize("keep", [3, 2000, 40_000, -1])
def test_a_truncated_shard(tiny: Path, tmp_path: Path, keep: int) -> None:
    path = tiny / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    assert "is damaged" in refused(tiny, tmp_path / "out")


def test_a_flipped_byte_where_a_hash_is_known(tiny: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((tiny / WEIGHTS).read_bytes()).hexdigest()
    (tiny / "SHA256SUMS").write_text(f"{digest}  {WEIGHTS}\n")
    run(tiny, tmp_path / "good")
    poke(tiny, "layers.0.attn.wq_a.weight", 0x55)
    assert "does not have the sha256" in refused(tiny, tmp_path / "out")


def test_a_damaged_file_is_called_that_whatever_its_bytes_look_like(
    tiny: Path, tmp_path: Path
) -> None:
    """The hash is compared also when reading stops early."""
    (tiny / "SHA256SUMS").write_text(f"{'a' * 64}  {WEIGHTS}\n")
    poke(tiny, "layers.0.ffn.experts.1.w2.scale", 255)
    assert "does not have the sha256" in refused(tiny, tmp_path / "out")


def test_a_file_that_many_shards_are_made_of_is_hashed_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256((tiny / WEIGHTS).read_bytes()).hexdigest()
    (tiny / "SHA256SUMS").write_text(f"{digest}  {WEIGHTS}\n")
    hashed = Mock(return_value=digest)
    monkeypatch.setattr(source_check, "file_sha256", hashed)
    run(tiny, tmp_path / "out")
    assert hashed.call_count == 1


def test_the_hash_that_a_hub_download_left_is_used(tiny: Path, tmp_path: Path) -> None:
    notes = tiny / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / f"{WEIGHTS}.metadata").write_text(f"{'a' * 40}\n{'b' * 64}\n1.0\n")
    assert "does not have the sha256" in refused(tiny, tmp_path / "out")


@pytest.mark.parametrize(
    ("tensor", "byte"),
    [
        ("layers.0.ffn.experts.1.w2.scale", 255),
        ("layers.1.attn.wkv.scale", 255),
        ("layers.1.attn.wkv.weight", 0x7F),
        ("layers.1.attn.wkv.weight", 0xFF),
    ],
)
def test_not_a_number(tiny: Path, tmp_path: Path, tensor: str, byte: int) -> None:
    poke(tiny, tensor, byte)
    message = refused(tiny, tmp_path / "out")
    assert tensor in message
    assert "not numbers" in message


def test_a_missing_tensor(tiny: Path, tmp_path: Path) -> None:
    name = "layers.2.attn.indexer.wq_b.scale"

    def rename(names: dict[str, Any]) -> None:
        names["mtp.0.left.over"] = names.pop(name)

    edit_header(tiny, rename)
    edit_json(tiny / "model.safetensors.index.json", lambda data: rename(data["weight_map"]))
    assert f"lacks {name}" in refused(tiny, tmp_path / "out")


def test_an_extra_tensor_would_be_lost(tiny: Path, tmp_path: Path) -> None:
    def add(header: dict[str, Any]) -> None:
        end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        header["layers.0.attn.bonus"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}

    edit_header(tiny, add)
    (tiny / "model.safetensors.index.json").unlink()
    assert "layers.0.attn.bonus" in refused(tiny, tmp_path / "out")


def test_a_wrong_shape(tiny: Path, tmp_path: Path) -> None:
    def turn(header: dict[str, Any]) -> None:
        header["layers.0.attn.wkv.weight"]["shape"].reverse()

    edit_header(tiny, turn)
    assert "where config.json makes it" in refused(tiny, tmp_path / "out")


def test_an_unknown_dtype(tiny: Path, tmp_path: Path) -> None:
    edit_header(tiny, lambda header: header["embed.weight"].update(dtype="F4"))
    assert "dtype F4" in refused(tiny, tmp_path / "out")


def test_overlapping_tensors(tiny: Path, tmp_path: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        header["hc_head_base"]["data_offsets"] = header["norm.weight"]["data_offsets"]
        header["hc_head_base"]["shape"] = [128]

    edit_header(tiny, overlap)
    assert "is damaged" in refused(tiny, tmp_path / "out")


def test_an_index_that_names_a_missing_file(tiny: Path, tmp_path: Path) -> None:
    index = tiny / "model.safetensors.index.json"
    edit_json(index, lambda data: data["weight_map"].update({"norm.weight": "model-2.safetensors"}))
    assert "model-2.safetensors, which is not there" in refused(tiny, tmp_path / "out")


def test_an_index_that_disagrees_with_the_files(tiny: Path, tmp_path: Path) -> None:
    index = tiny / "model.safetensors.index.json"
    edit_json(index, lambda data: data["weight_map"].update({"layers.9.x": WEIGHTS}))
    assert "layers.9.x" in refused(tiny, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../b", "C:\\x", "..\\x", "a\0b"]
)
def test_an_index_that_points_outside(tiny: Path, tmp_path: Path, name: str) -> None:
    index = tiny / "model.safetensors.index.json"
    edit_json(index, lambda data: data["weight_map"].update({"norm.weight": name}))
    assert "points outside its folder" in refused(tiny, tmp_path / "out")
    with pytest.raises(ConvertError):
        safe_name(name, "a list of tokenizer files")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "deepseek_v41"}, "DeepSeek-V4.1"),
        ({"vision_n_layers": 24}, "vision"),
        ({"model_type": "llama"}, "'llama'"),
        ({"compress_ratios": None}, "compress_ratios"),
        ({"compress_ratios": [0, 0, 4, 64, 4, 0]}, "64"),
        ({"compress_ratios": [0, 0]}, "all 5 layers"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_another_model_is_refused_by_name(
    tiny: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    edit_json(tiny / "config.json", lambda data: data.update(change))
    assert says in refused(tiny, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_a_broken_config(tiny: Path, tmp_path: Path, text: str) -> None:
    (tiny / "config.json").write_text(text)
    assert "config.json" in refused(tiny, tmp_path / "out")


def test_no_space_is_told_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda path: 1_000_000)
    message = refused(tiny, tmp_path / "out")
    assert "0.01 GB for the result + 0.27 GB to spare = 0.27 GB, but 0.00 GB are free" in message
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_verified_shards(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxsteer.convert import run as runner

    real, calls = runner.write_shard, []

    def full(path: Path, *rest: Any) -> Any:
        calls.append(path)
        if len(calls) == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(path, *rest)

    monkeypatch.setattr(runner, "write_shard", full)
    with pytest.raises(Exception, match="No space left on device"):
        run(tiny, tmp_path / "out")
    monkeypatch.undo()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 3
    assert run(tiny, tmp_path / "out").resumed == 3


def test_no_permission(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError, match="Cannot write into"):
        run(tiny, tmp_path / "file" / "out")


def test_a_folder_of_the_user_is_not_written_into(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "already holds thesis.tex" in refused(tiny, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_finished_result_stays_finished_when_another_recipe_is_refused_there(
    tiny: Path, tmp_path: Path
) -> None:
    run(tiny, tmp_path / "out", "q2")
    with pytest.raises(ConvertError, match="already holds"):
        run(tiny, tmp_path / "out", "q3")
    assert run(tiny, tmp_path / "out", "q2").resumed > 0


def test_a_source_is_not_its_own_target(tiny: Path) -> None:
    with pytest.raises(ConvertError, match="already holds"):
        run(tiny, tiny)
    assert (tiny / WEIGHTS).is_file()
