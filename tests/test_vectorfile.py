"""Claims about the vector file: it keeps everything, and refuses what is not itself."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mlxsteer.errors import MlxsteerError, VectorError
from mlxsteer.vector import Calibration, SteeringVector

D, LAYERS = 8, 5


def unit(seed: int, *shape: int) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(size=shape or (D,)).astype(np.float32)
    return raw / np.linalg.norm(raw)


def full_vector(**fields) -> SteeringVector:
    return SteeringVector(
        "knapp",
        {1: unit(1), 3: unit(3)},
        LAYERS,
        **{
            "residual_norm": np.arange(1, 6, dtype=np.float32),
            "layer_share": np.array([0, 0.25, 0, 0.75, 0], np.float32),
            "magnitude": np.array([0, 2, 0, 3, 0], np.float32),
            "control_mean": {1: unit(7)},
            "gain": 2.5,
            "calibration": Calibration(0.4, 0.2, {"ppl": 3}, 200, ({"dose": 0.1, "ppl": 2.0},)),
            "model": {"base_model": "owner/model", "architecture": "llama"},
            "about": {"description": "kürzer", "positive_label": "terse", "n_pairs": 8},
        }
        | fields,
    )


def saved(tmp_path: Path, vector: SteeringVector | None = None) -> Path:
    return (vector or full_vector()).save(tmp_path / "v.safetensors")


def test_a_vector_comes_back_bit_for_bit(tmp_path: Path) -> None:
    before = full_vector()
    after = SteeringVector.load(saved(tmp_path, before))
    for what in ("directions", "control_mean"):
        assert getattr(after, what).keys() == getattr(before, what).keys()
        for layer, array in getattr(before, what).items():
            np.testing.assert_array_equal(getattr(after, what)[layer], array)
    for what in ("residual_norm", "layer_share", "magnitude"):
        np.testing.assert_array_equal(getattr(after, what), getattr(before, what))
    for what in ("name", "op", "site", "n_layers", "gain", "effect", "positions", "calibration"):
        assert getattr(after, what) == getattr(before, what)
    assert after.model["base_model"] == "owner/model"
    assert {key: after.about[key] for key in before.about} == dict(before.about)


@pytest.mark.parametrize(
    "vector",
    [
        SteeringVector.from_arrays({2: np.eye(D)[:3]}, op="project", n_layers=4, effect="amplify"),
        SteeringVector.from_arrays({2: unit(5, 4, D)}, site="stream", n_layers=4),
        SteeringVector.from_arrays({0: unit(5)}, op="clamp", site="ffn_out", positions="all"),
    ],
    ids=["rank 3 projection", "per-stream", "clamp"],
)
def test_every_kind_of_direction_comes_back(tmp_path: Path, vector: SteeringVector) -> None:
    after = SteeringVector.load(saved(tmp_path, vector))
    assert (after.op, after.site, after.effect) == (vector.op, vector.site, vector.effect)
    for layer, array in vector.directions.items():
        np.testing.assert_array_equal(after.directions[layer], array)


def test_the_layout_is_the_written_one(tmp_path: Path) -> None:
    path = saved(tmp_path)
    tensors = load_file(path)
    assert set(tensors) == {
        *("direction.1", "direction.3", "control_mean.1"),
        *("residual_norm", "layer_share", "magnitude"),
    }
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["mlxsteer"])
    assert metadata["name"] == facts["name"] == "knapp"
    assert facts["layers"] == [1, 3]
    assert facts["d_model"] == D
    assert {"op", "site", "n_layers", "content_sha256", "calibration", "created_with"} <= set(facts)


def rewritten(path: Path, change) -> Path:
    """The file with `change(tensors, facts)` applied, and nothing else made to agree."""
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["mlxsteer"])
    change(tensors, facts)
    save_file(tensors, path, {"mlxsteer": json.dumps(facts)})
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, f: t["direction.1"].__imul__(-1), "do not match their recorded hash"),
        (lambda t, f: t.update({"direction.2": t["direction.1"]}), "recorded hash"),
        (lambda t, f: f.update(op="rotate"), "Unknown op 'rotate'"),
        (lambda t, f: f.update(site="mlp"), "Unknown site 'mlp'"),
        (lambda t, f: f.update(d_model=9), "says width 9, holds 8"),
        (lambda t, f: f.update(layers=[1, 2]), "different layers"),
        (lambda t, f: f.update(n_layers=2), "layer 3, but its model has layers 0 to 1"),
        (lambda t, f: f.update(format_version=99), "Upgrade mlxsteer"),
        (lambda t, f: f.pop("op"), "header is damaged"),
        (lambda t, f: f.update(calibration={"delta_plus": "x"}), "header is damaged"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, change, says: str) -> None:
    with pytest.raises(VectorError, match=says) as caught:
        SteeringVector.load(rewritten(saved(tmp_path), change))
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(VectorError) as caught:
            SteeringVector.load(path)
        assert "\n" not in str(caught.value)


def test_a_flipped_byte_never_goes_unseen_in_the_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    for position in range(start, len(whole), 5):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(VectorError):
            SteeringVector.load(path)


@pytest.mark.parametrize("name", ["v.pt", "v.bin", "v.safetensors", "v.gguf"])
def test_a_pickle_is_refused_under_any_name_and_never_run(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / name
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(VectorError, match="pickle, which can run code"):
        SteeringVector.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_header_of_any_length_is_no_pickle(tmp_path: Path) -> None:
    lengths = set()
    for padding in range(0, 260, 8):  # headers are padded to multiples of 8 bytes
        path = saved(tmp_path, full_vector(about={"description": "x" * padding}))
        lengths.add(path.read_bytes()[0])
        SteeringVector.load(path)
    assert 0x80 in lengths


def test_a_missing_file_and_a_foreign_one_say_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="There is no file"):
        SteeringVector.load(tmp_path / "none.safetensors")
    save_file({"layer.1": np.ones(D, np.float32)}, tmp_path / "bare.safetensors")
    with pytest.raises(VectorError, match=r"mlxsteer vectors import .*--op add --site residual"):
        SteeringVector.load(tmp_path / "bare.safetensors")
    (tmp_path / "v.gguf").write_bytes(b"GGUF")
    with pytest.raises(VectorError, match="mlxsteer vectors import"):
        SteeringVector.load(tmp_path / "v.gguf")


@pytest.mark.parametrize("where", ["write_bytes", "replace"])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch, where: str) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(*_args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, where, full)
    with pytest.raises(MlxsteerError, match=r"No space left on device.*free some space") as caught:
        (2 * full_vector()).save(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
