"""Claims about GGUF control vectors and GLP: layers keep their places, signs their meaning."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from mlxsteer.errors import VectorError
from mlxsteer.formats import export_file, import_file
from mlxsteer.vector import Calibration, SteeringVector
from tests.foreign_files import (
    LAYERS,
    ROWS,
    D,
    cosine,
    directions,
    glp_keys,
    llama_cpp_adds,
    quiet,
    unit,
    write_gguf,
    write_glp,
)

# --- llama.cpp and repeng -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int32", "uint32"])
def test_gguf_one_hot_layers_land_where_llama_cpp_applies_them(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    add = {"int32": writer.add_int32, "uint32": writer.add_uint32}[kind]
    add("controlvector.layer_count", 5)
    for name, row in directions(range(1, 6)).items():
        writer.add_tensor(name, 3 * row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    vector = import_file(path)
    expected = llama_cpp_adds(path)
    assert vector.layers == tuple(expected) == (1, 2, 3, 4, 5)
    for layer, row in expected.items():
        np.testing.assert_array_equal(vector.directions[layer], ROWS[layer])
        length = vector.lengths(1, "r", None)[layer]
        np.testing.assert_allclose(length * vector.directions[layer], row)
    assert vector.about["model_hint"] == "llama"
    assert vector.positions == "all"


def test_gguf_generator_base_moves_every_layer_down_by_one(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", directions(range(1, 6)))
    vector = import_file(path, gguf_base="generator")
    assert vector.layers == (0, 1, 2, 3, 4)
    for layer in vector.layers:
        np.testing.assert_array_equal(vector.directions[layer], ROWS[layer + 1])


@pytest.mark.parametrize("base", ["exact", "generator"])
def test_gguf_one_hot_layers_return_to_their_places(tmp_path: Path, base: str) -> None:
    acting = range(1, LAYERS) if base == "exact" else range(LAYERS)
    vector = SteeringVector.from_arrays({k: ROWS[k] for k in acting}, n_layers=LAYERS)
    export_file(vector, tmp_path / "v.gguf", gguf_base=base, warn=quiet)
    back = import_file(tmp_path / "v.gguf", gguf_base=base)
    assert back.layers == tuple(acting)
    assert back.n_layers == LAYERS
    assert all(cosine(back.directions[k], ROWS[k]) == 1 for k in acting)
    applied = llama_cpp_adds(tmp_path / "v.gguf")
    late = 1 if base == "generator" else 0
    assert all(cosine(applied[k + late], ROWS[k]) == 1 for k in acting)


@pytest.mark.parametrize("factor", [1, -1, 2.5, -0.5])
def test_gguf_round_trip_keeps_the_signed_shift(tmp_path: Path, factor: float) -> None:
    arrays = {k: 7 * k * unit(k) for k in (1, 3, 5)}
    vector = factor * SteeringVector.from_arrays(arrays, n_layers=LAYERS)
    export_file(vector, tmp_path / "v.gguf", warn=quiet)
    back = import_file(tmp_path / "v.gguf")
    lengths = back.lengths(1, "r", None)
    for layer, array in arrays.items():
        shift = lengths[layer] * back.directions[layer]
        assert cosine(shift, factor * array) > 0.999
        np.testing.assert_allclose(shift, factor * array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 3.0, -2.0])
def test_gguf_scale_1_of_a_calibrated_vector_is_the_strength_asked_for(
    tmp_path: Path, strength: float
) -> None:
    norms = np.linspace(10, 60, LAYERS).astype(np.float32)
    vector = SteeringVector(
        "terse",
        {2: unit(2), 4: unit(4)},
        LAYERS,
        residual_norm=norms,
        calibration=Calibration(0.4, 0.2),
    )
    remarks: list[str] = []
    export_file(vector, tmp_path / "v.gguf", strength=strength, warn=remarks.append)
    dose = strength / 5 * (0.4 if strength > 0 else 0.2)
    for layer, row in llama_cpp_adds(tmp_path / "v.gguf").items():
        expected = dose * 0.5 * norms[layer] * vector.directions[layer]
        np.testing.assert_allclose(row, expected, rtol=1e-5)
    assert any("every position" in remark for remark in remarks)


def test_layer_0_is_refused_by_name_or_dropped_when_told(tmp_path: Path) -> None:
    vector = SteeringVector.from_arrays({0: ROWS[0], 2: ROWS[2]}, n_layers=LAYERS)
    for format in ("gguf", "glp"):
        with pytest.raises(VectorError, match=r"Layer 0 cannot be expressed.*--drop-layer-0"):
            export_file(vector, tmp_path / "v.gguf", format, warn=quiet)
        assert not (tmp_path / "v.gguf").exists()
    export_file(vector, tmp_path / "v.gguf", drop_layer_0=True, warn=quiet)
    assert import_file(tmp_path / "v.gguf").layers == (2,)


def test_what_llama_cpp_would_add_wrongly_is_not_exported(tmp_path: Path) -> None:
    for fields, says in (
        ({"op": "project"}, "llama.cpp would add it.*--format glp"),
        ({"op": "clamp"}, "llama.cpp would add it"),
        ({"site": "ffn_out"}, "acts at ffn_out.*--format glp"),
        ({"norm_preserving": True}, "keeps the norm"),
    ):
        vector = SteeringVector.from_arrays({2: ROWS[2]}, n_layers=LAYERS, **fields)
        with pytest.raises(VectorError, match=says):
            export_file(vector, tmp_path / "v.gguf", warn=quiet)


@pytest.mark.parametrize(
    ("tensors", "keys", "says"),
    [
        (directions([0, 1]), {}, "direction.0 cannot be"),
        (directions([1]), {"architecture": "llama"}, "architecture 'llama', not a control vector"),
        ({"blk.0.weight": ROWS}, {}, "no direction.N tensor"),
        ({"direction.1": ROWS}, {}, "one-dimensional"),
        ({"direction.1": ROWS[1].astype(np.float16)}, {}, "F16"),
        ({"direction.1": ROWS[1], "direction.2": np.ones(D + 1, np.float32)}, {}, "mixes widths"),
        ({"direction.1": np.full(D, np.nan, np.float32)}, {}, "NaN"),
        ({"direction.1": np.zeros(D, np.float32)}, {}, "only zeros"),
        ({"direction.1": ROWS[1], "direction.1.1": ROWS[2]}, {}, "several directions at layer 1"),
        (directions([9]), {"mlxsteer.n_layers": 6}, "9 is out of range"),
    ],
)
def test_a_gguf_that_is_no_control_vector_is_refused(tmp_path, tensors, keys, says) -> None:
    path = write_gguf(tmp_path / "v.gguf", tensors, **keys)
    with pytest.raises(VectorError, match=says) as caught:
        import_file(path, warn=quiet)
    assert "\n" not in str(caught.value)


# --- GLP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("residual_stream_post_layer", "residual"),
        ("ffn_out_pre_residual", "ffn_out"),
        ("attn_out_pre_residual", "attn_out"),
    ],
)
def test_glp_one_hot_layers_and_facts(tmp_path: Path, hook: str, site: str) -> None:
    remarks: list[str] = []
    path = write_glp(tmp_path / "v.gguf", **{"glp.hook_point": hook})
    vector = import_file(path, n_layers=LAYERS, warn=remarks.append)
    assert (vector.op, vector.site, vector.layers) == ("project", site, (1, 2, 4))
    assert all((vector.directions[k] == ROWS[k]).all() for k in vector.layers)
    assert vector.share_removed(0.75) == 0.75
    assert vector.about["alpha_default"] == 2
    assert any("α = 2" in remark for remark in remarks)
    assert vector.model["base_model"] == "deepseek-ai/DeepSeek-V4-Flash"
    assert vector.model["base_revision"] == "a" * 40

    export_file(vector, tmp_path / "back.gguf", "glp", warn=quiet)
    before, after = (
        {k: f.contents() for k, f in gguf.GGUFReader(p).fields.items()}
        for p in (path, tmp_path / "back.gguf")
    )
    for key in glp_keys(directions([1, 2, 4])):
        assert after[key] == before[key], key


def test_glp_contents_keep_their_hash(tmp_path: Path) -> None:
    tensors = {f"direction.{k}": unit(k) for k in range(1, 6)}
    vector = import_file(write_glp(tmp_path / "v.gguf", tensors), warn=quiet)
    export_file(vector, tmp_path / "w.gguf", "glp", warn=quiet)
    hashes = {
        gguf.GGUFReader(tmp_path / name).fields["glp.content_sha256"].contents()
        for name in ("v.gguf", "w.gguf")
    }
    assert len(hashes) == 1


def test_glp_rank_k_comes_and_goes(tmp_path: Path) -> None:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(D, 3)))[0].T.astype(np.float32)
    tensors = {"direction.2": basis[0], "direction.2.1": basis[1], "direction.2.2": basis[2]}
    path = write_glp(tmp_path / "v.gguf", tensors, **{"glp.rank": 3, "glp.spec_version": 2})
    vector = import_file(path, warn=quiet)
    np.testing.assert_array_equal(vector.directions[2], basis)
    export_file(vector, tmp_path / "back.gguf", "glp", warn=quiet)
    back = import_file(tmp_path / "back.gguf", warn=quiet)
    np.testing.assert_allclose(back.directions[2], basis, atol=1e-6)


@pytest.mark.parametrize("factor", [1, -1, 2, -0.5])
@pytest.mark.parametrize("op", ["project", "add"])
def test_glp_round_trip_keeps_the_sign_and_the_strength(tmp_path, factor: float, op: str) -> None:
    vector = factor * SteeringVector.from_arrays(
        {1: 3 * unit(1), 5: unit(5)}, op=op, n_layers=LAYERS
    )
    export_file(vector, tmp_path / "v.gguf", "glp", warn=quiet)
    back = import_file(tmp_path / "v.gguf", warn=quiet)
    for layer in (1, 5):
        assert cosine(back.directions[layer], vector.directions[layer]) > 0.999
    if op == "project":
        assert back.share_removed(1) == pytest.approx(vector.share_removed(1))
        export_file(back, tmp_path / "again.gguf", "glp", warn=quiet)
        for path in (tmp_path / "v.gguf", tmp_path / "again.gguf"):
            alpha = gguf.GGUFReader(path).fields["glp.alpha_default"].contents()
            assert alpha == pytest.approx(vector.share_removed(1))
    else:
        np.testing.assert_allclose(back.lengths(1, "r", None), vector.lengths(1, "r", None), 1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"glp.mode": "rotate"}, "glp.mode 'rotate'"),
        ({"glp.mode": None}, "no glp.mode"),
        ({"glp.spec_version": 3}, "version 3"),
        ({"glp.hook_point": "logits"}, "hook point 'logits'"),
        ({"glp.hook_point": None}, "or say --site"),
        ({"glp.content_sha256": "0" * 64}, "do not match"),
        ({"glp.layer_ids_zero_based": "1,2"}, "lists layers 1,2"),
        ({"glp.rank": 2}, "keys of version 2"),
        ({"glp.rank": 2, "glp.spec_version": 2}, "has 1 directions at layer 1, not 2"),
        ({"glp.rank": 2, "glp.spec_version": 2, "glp.orthonormal": False}, "without"),
        ({"glp.dir_scales": "0.5", "glp.spec_version": 2}, "unequal strengths"),
        ({"glp.layer_scales": "1:1.0,2:0.5", "glp.spec_version": 2}, "unequal strengths"),
        ({"glp.alpha_default": "strong"}, "no number"),
    ],
)
def test_a_glp_that_cannot_be_obeyed_is_refused(tmp_path, changes: dict, says: str) -> None:
    with pytest.raises(VectorError, match=says) as caught:
        import_file(write_glp(tmp_path / "v.gguf", **changes), warn=quiet)
    assert "\n" not in str(caught.value)


def test_a_glp_projection_must_be_unit_and_orthogonal(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="length 2, not 1"):
        import_file(write_glp(tmp_path / "v.gguf", directions([1], 2 * ROWS)), warn=quiet)
    tensors = {"direction.1": ROWS[1], "direction.1.1": unit(1)}
    keys = {"glp.rank": 2, "glp.spec_version": 2}
    with pytest.raises(VectorError, match="not orthogonal"):
        import_file(write_glp(tmp_path / "w.gguf", tensors, **keys), warn=quiet)
    with pytest.raises(VectorError, match="Leave --gguf-base out"):
        import_file(tmp_path / "w.gguf", gguf_base="generator", warn=quiet)
