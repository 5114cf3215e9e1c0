"""The lossless recipe, against decoders written from the formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxsteer.convert.layout import Matrix, model_layout
from tests.convert import reference
from tests.convert.conftest import TINY, run
from tests.convert.golden import our_errors

CONFIG = json.loads((TINY / "config.json").read_text())
QUANTISED = [
    m for unit in model_layout(CONFIG) for m in unit.matrices if m.kind not in ("embed", "head")
]


@pytest.fixture(scope="module")
def source() -> dict[str, np.ndarray]:
    return reference.load_folder(TINY)


@pytest.fixture(scope="module")
def result(converted: Callable[[str], Path]) -> dict[str, np.ndarray]:
    return reference.load_folder(converted("lossless"))


def official_values(matrix: Matrix, source: dict[str, np.ndarray]) -> np.ndarray:
    pieces = [reference.source_matrix(source, name) for name in matrix.sources]
    return np.concatenate(pieces).reshape(matrix.shape)


def test_all_102_quantised_tensors_are_bit_identical_to_a_direct_decode(
    source: dict[str, np.ndarray], result: dict[str, np.ndarray]
) -> None:
    assert sum(len(m.sources) for m in QUANTISED) == 102
    for matrix in QUANTISED:
        bits = 4 if matrix.kind == "experts" else 8
        weight, scales = result[f"{matrix.path}.weight"], result[f"{matrix.path}.scales"]
        ours = reference.mx_matrix(weight, scales, bits)
        expected = official_values(matrix, source)
        # float32 bits, so that -0 and 0 count as different
        np.testing.assert_array_equal(
            ours.astype(np.float32).view(np.uint32), expected.astype(np.float32).view(np.uint32)
        )


def test_mlx_reads_the_same_values(
    source: dict[str, np.ndarray], converted: Callable[[str], Path]
) -> None:
    tensors: dict[str, mx.array] = {}
    for path in converted("lossless").glob("model*.safetensors"):
        tensors.update(mx.load(str(path)))  # type: ignore[arg-type]
    for matrix in QUANTISED:
        mode, bits = ("mxfp4", 4) if matrix.kind == "experts" else ("mxfp8", 8)
        weight, scales = tensors[f"{matrix.path}.weight"], tensors[f"{matrix.path}.scales"]
        decoded = mx.dequantize(weight, scales, group_size=32, bits=bits, mode=mode)
        values = np.array(decoded.astype(mx.float32))
        np.testing.assert_array_equal(values, official_values(matrix, source))


def test_unquantised_tensors_keep_their_bytes_and_int64_becomes_int32(
    source: dict[str, np.ndarray], result: dict[str, np.ndarray]
) -> None:
    for unit in model_layout(CONFIG):
        for plain in unit.plains:
            before, after = source[plain.source], result[plain.name]
            assert after.dtype == (np.int32 if before.dtype == np.int64 else before.dtype)
            np.testing.assert_array_equal(after, before)
    for name, path in (("embed", "model.embed_tokens"), ("head", "lm_head")):
        np.testing.assert_array_equal(result[f"{path}.weight"], source[f"{name}.weight"])


def test_config_maps_every_quantised_module_and_drops_the_source_map(
    converted: Callable[[str], Path],
) -> None:
    config = json.loads((converted("lossless") / "config.json").read_text())
    assert "quantization_config" not in config
    quantization = config["quantization"]
    for matrix in QUANTISED:
        bits = 4 if matrix.kind == "experts" else 8
        assert quantization[matrix.path] == {"group_size": 32, "bits": bits, "mode": f"mxfp{bits}"}
    assert "lm_head" not in quantization
    same = CONFIG.keys() - {"quantization_config", "num_nextn_predict_layers"}
    assert {key: config[key] for key in same} == {key: CONFIG[key] for key in same}


def test_index_names_every_tensor_and_its_bytes(
    converted: Callable[[str], Path], result: dict[str, np.ndarray]
) -> None:
    index = json.loads((converted("lossless") / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(result)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in result.values())


def test_early_downloads_without_expert_dtype_give_the_same_bytes(
    tiny: Path, tmp_path: Path, result: dict[str, np.ndarray]
) -> None:
    config = {k: v for k, v in CONFIG.items() if k not in ("expert_dtype", "quantization_config")}
    (tiny / "config.json").write_text(json.dumps(config))
    run(tiny, tmp_path / "out")
    for name, tensor in reference.load_folder(tmp_path / "out").items():
        np.testing.assert_array_equal(tensor, result[name])


@pytest.mark.parametrize("recipe", ["lossless", "q4-fast", "q3", "q2", "q2-fast"])
def test_our_module_loads_every_recipe_with_strict_names(
    recipe: str, converted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    error = our_errors(converted(recipe), 200 if recipe == "lossless" else 48)
    with capsys.disabled():
        print(f"\n  {recipe}: logit error rms {np.sqrt(np.mean(error**2)):.2e}", end="")
    assert error.max() < (1e-4 if recipe == "lossless" else 8)
