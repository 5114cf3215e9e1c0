"""Claims about foreign vector files: every layer lands in its place, every sign keeps its meaning.

The files are written here with the `gguf` package or numpy alone, as their own programs write
them, and what they do is computed by hand from those programs' formulas.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from contextlib import suppress
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask
from safetensors.numpy import save_file

from mlxsteer.edits import Stacker
from mlxsteer.errors import MlxsteerError, UsageError, VectorError
from mlxsteer.formats import export_file, import_file
from mlxsteer.grammar import Term
from mlxsteer.models import adapters
from mlxsteer.models.hooks import Run
from mlxsteer.plan import PROMPT, ModelShape, build
from mlxsteer.vector import Calibration, SteeringVector

D, LAYERS = 16, 6
ROWS = np.eye(D, dtype=np.float32)  # row L belongs to layer L: a shifted map has cosine 0
DS4_VERBOSITY = Path(
    os.environ.get("MLXSTEER_DS4_VERBOSITY")
    or Path(__file__).parents[2] / "shared" / "data" / "ds4-verbosity.f32"
)


def unit(seed: int, *shape: int) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(size=shape or (D,)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=-1, keepdims=True)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def quiet(_message: str) -> None:
    """Takes remarks that the test does not look at."""


def write_gguf(path: Path, tensors: dict[str, np.ndarray], **keys) -> Path:
    """A control vector file by the gguf package alone; keys are typed by their Python type."""
    writer = gguf.GGUFWriter(path, keys.pop("architecture", "controlvector"))
    for key, value in keys.items():
        add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
        add.get(type(value), writer.add_uint32)(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def directions(numbers, rows=ROWS) -> dict[str, np.ndarray]:
    return {f"direction.{n}": rows[n].copy() for n in numbers}


def llama_cpp_adds(path: Path) -> dict[int, np.ndarray]:
    """{0-based block: what llama.cpp adds at its output}, by its loader's and graph's own rule."""
    flat: dict[int, np.ndarray] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        number = int(tensor.name.split(".")[1])
        assert number >= 1
        flat[(number - 1) * D] = np.array(tensor.data)
    return {block: flat[(block - 1) * D] for block in range(1, 99) if (block - 1) * D in flat}


# --- llama.cpp and repeng ---------------------------------------------------------------------


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


# --- GLP --------------------------------------------------------------------------------------


def glp_keys(tensors: dict[str, np.ndarray], **changes) -> dict:
    """The metadata that GLP's own exporters write for `tensors` (names in ascending order)."""
    digest = hashlib.sha256(b"".join(array.tobytes() for array in tensors.values()))
    numbers = dict.fromkeys(name.split(".")[1] for name in tensors)
    keys = {
        "glp.mode": "project",
        "glp.spec_version": 1,
        "glp.hook_point": "residual_stream_post_layer",
        "glp.alpha_default": 2.0,
        "glp.rank": 1,
        "glp.orthonormal": True,
        "glp.layer_ids_zero_based": ",".join(numbers),
        "glp.content_sha256": digest.hexdigest(),
        "general.base_model.0.name": "DeepSeek-V4-Flash",
        "general.base_model.0.organization": "deepseek-ai",
        "general.base_model.0.version": "a" * 40,
    }
    return {key: value for key, value in (keys | changes).items() if value is not None}


def write_glp(path: Path, tensors: dict[str, np.ndarray] | None = None, **changes) -> Path:
    tensors = tensors or directions([1, 2, 4])
    return write_gguf(path, tensors, **glp_keys(tensors, **changes))


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


# --- ds4 --------------------------------------------------------------------------------------


def write_ds4(path: Path, rows: np.ndarray, **changes) -> Path:
    sidecar = {
        "format": "ds4-directional-steering-v1",
        "shape": list(rows.shape),
        "component": "ffn_out",
        "good_file": "examples/succinct.txt",
        "bad_file": "examples/verbose.txt",
    }
    rows.astype("<f4").tofile(path)
    path.with_suffix(".json").write_text(json.dumps(sidecar | changes))
    return path


@pytest.mark.parametrize("component", ["ffn_out", "attn_out"])
def test_ds4_one_hot_rows_land_in_their_layers_and_return(tmp_path: Path, component: str) -> None:
    rows = ROWS[:LAYERS].copy()
    rows[3] = 0
    vector = import_file(write_ds4(tmp_path / "v.f32", rows, component=component))
    assert vector.layers == (0, 1, 2, 4, 5)
    assert (vector.op, vector.site, vector.n_layers) == ("project", component, LAYERS)
    assert (vector.name, vector.about["negative_label"]) == ("succinct", "verbose")
    assert all((vector.directions[k] == ROWS[k]).all() for k in vector.layers)
    written = export_file(vector, tmp_path / "back.f32", warn=quiet)
    assert [path.name for path in written] == ["back.f32", "back.json"]
    assert (tmp_path / "back.f32").read_bytes() == (tmp_path / "v.f32").read_bytes()


def test_ds4_positive_strength_is_a_negative_scale(tmp_path: Path) -> None:
    vector = import_file(write_ds4(tmp_path / "v.f32", ROWS[:LAYERS]))
    assert vector.share_removed(1) == -1
    remarks: list[str] = []
    export_file(vector, tmp_path / "w.f32", strength=2, warn=remarks.append)
    assert "strength 2 is --dir-steering-ffn -2" in remarks[0]


@pytest.mark.parametrize("factor", [1, -1, 2, -0.5])
def test_ds4_round_trip_keeps_the_sign_and_the_strength(tmp_path: Path, factor: float) -> None:
    vector = factor * import_file(write_ds4(tmp_path / "v.f32", unit(0, LAYERS, D)))
    export_file(vector, tmp_path / "w.f32", warn=quiet)
    back = import_file(tmp_path / "w.f32")
    assert back.share_removed(1) == pytest.approx(vector.share_removed(1)) == -factor
    assert all(back.cosines(vector)[k] > 0.999 for k in range(LAYERS))


def test_ds4_passes_through_glp_with_its_sign(tmp_path: Path) -> None:
    vector = import_file(write_ds4(tmp_path / "v.f32", unit(0, LAYERS, D)))
    export_file(vector, tmp_path / "v.gguf", "glp", drop_layer_0=True, warn=quiet)
    back = import_file(tmp_path / "v.gguf", warn=quiet)
    assert (back.site, back.share_removed(1), back.layers) == ("ffn_out", -1, (1, 2, 3, 4, 5))
    assert back.about["suggested_strength"] == 1
    assert back @ vector == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: os.truncate(p, 4 * D * LAYERS - 8), "376 bytes; 6 layers of width 16 take 384"),
        (lambda p: p.with_suffix(".json").unlink(), "43 layers of width 4096|component is None"),
        (lambda p: p.with_suffix(".json").write_text('{"format": "x"}'), "is of format 'x'"),
        (lambda p: p.with_suffix(".json").write_text("[1"), "json is damaged"),
        (lambda p: write_ds4(p, ROWS[:LAYERS], shape=[6]), "is not \\[layers, width\\]"),
        (lambda p: write_ds4(p, ROWS[:LAYERS], shape=[6, 17]), "take 408"),
        (lambda p: write_ds4(p, ROWS[:LAYERS], component="mlp"), "component is 'mlp'"),
        (lambda p: write_ds4(p, 2 * ROWS[:LAYERS]), "row 0 has length 2, not 1"),
        (lambda p: write_ds4(p, 0 * ROWS[:LAYERS]), "only zeros"),
        (lambda p: write_ds4(p, np.nan * ROWS[:LAYERS]), "NaN"),
    ],
)
def test_a_damaged_ds4_pair_is_refused(tmp_path: Path, change, says: str) -> None:
    path = write_ds4(tmp_path / "v.f32", ROWS[:LAYERS])
    change(path)
    with pytest.raises(VectorError, match=says) as caught:
        import_file(path, warn=quiet)
    assert "\n" not in str(caught.value)


def test_only_what_ds4_can_do_is_exported_to_it(tmp_path: Path) -> None:
    for fields, says in (
        ({"op": "add", "n_layers": LAYERS}, "ds4 only projects"),
        ({"op": "project", "site": "residual", "n_layers": LAYERS}, "at ffn_out or attn_out"),
        ({"op": "project", "site": "ffn_out"}, "--n-layers"),
    ):
        vector = SteeringVector.from_arrays({2: ROWS[2]}, **fields)
        with pytest.raises(VectorError, match=says):
            export_file(vector, tmp_path / "v.f32", warn=quiet)


@pytest.mark.skipif(not DS4_VERBOSITY.is_file(), reason="the real ds4 vector is not here")
def test_the_real_ds4_vector_comes_in_whole_and_goes_out_identical(tmp_path: Path) -> None:
    vector = import_file(DS4_VERBOSITY)
    assert (vector.n_layers, vector.d_model, vector.site) == (43, 4096, "ffn_out")
    assert vector.layers == tuple(range(43))
    rows = np.fromfile(DS4_VERBOSITY, "<f4").reshape(43, 4096)
    assert min(cosine(vector.directions[k], rows[k]) for k in range(43)) > 0.999
    assert max(abs(cosine(vector.directions[k], rows[k + 1])) for k in range(42)) < 0.5
    export_file(vector, tmp_path / "w.f32", warn=quiet)
    assert (tmp_path / "w.f32").read_bytes() == DS4_VERBOSITY.read_bytes()


# --- bare arrays ------------------------------------------------------------------------------


def test_bare_arrays_need_op_site_and_layers(tmp_path: Path) -> None:
    save_file({f"layer.{k}": 2 * ROWS[k] for k in range(LAYERS)}, tmp_path / "v.safetensors")
    told = {"op": "add", "site": "residual", "layers": [2, 4]}
    for missing in told:
        with pytest.raises(UsageError, match="--op add --site residual --layers 10-19"):
            import_file(
                tmp_path / "v.safetensors", **{k: v for k, v in told.items() if k != missing}
            )
    vector = import_file(tmp_path / "v.safetensors", **told, n_layers=LAYERS)
    assert vector.layers == (2, 4)
    assert vector.lengths(1, "r", None)[2] == 2
    with pytest.raises(VectorError, match="no array for layer 9"):
        import_file(tmp_path / "v.safetensors", **told | {"layers": [9]})


def test_one_array_holds_a_row_for_each_layer(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", rows=ROWS[:3])
    told = {"op": "project", "site": "ffn_out"}
    some = import_file(tmp_path / "v.npz", **told, layers=[2, 3, 5])
    assert (some.directions[5] == ROWS[2]).all()
    whole = import_file(tmp_path / "v.npz", **told, layers=[1], n_layers=3)
    assert (whole.directions[1] == ROWS[1]).all()
    with pytest.raises(VectorError, match="3 rows for the 1 layers named"):
        import_file(tmp_path / "v.npz", **told, layers=[1])


def test_bfloat16_arrays_come_in_and_integers_do_not(tmp_path: Path) -> None:
    told = {"op": "add", "site": "residual", "layers": [3]}
    mx.save_safetensors(str(tmp_path / "b"), {"layer.3": mx.arange(1, 9).astype(mx.bfloat16)})
    vector = import_file(tmp_path / "b.safetensors", **told)
    np.testing.assert_allclose(vector.lengths(1, "r", None)[3], np.sqrt(204), rtol=1e-6)
    mx.save_safetensors(str(tmp_path / "i"), {"layer.3": mx.arange(1, 9).astype(mx.uint8)})
    with pytest.raises(VectorError, match="not floats"):
        import_file(tmp_path / "i.safetensors", **told)


def test_pickled_arrays_are_refused_and_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "v.npz", rows=np.array([Trap()], object))
    for name in ("v.gguf", "v.pt", "v.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    told = {"op": "add", "site": "residual", "layers": [0]}
    for name in ("v.npz", "v.gguf", "v.pt", "v.safetensors"):
        with pytest.raises(VectorError, match="pickle") as caught:
            import_file(tmp_path / name, **told)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


# --- every format -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [write_glp, lambda p: write_gguf(p, directions([1, 2]))])
def test_a_gguf_cut_anywhere_is_refused_in_one_line(tmp_path: Path, make) -> None:
    whole = make(tmp_path / "v.gguf").read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in range(0, end, 11):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(VectorError) as caught:
            import_file(tmp_path / "cut.gguf", warn=quiet)
        assert "\n" not in str(caught.value)


def test_a_gguf_with_a_flipped_byte_is_refused_or_read_but_never_crashes(tmp_path: Path) -> None:
    whole = write_glp(tmp_path / "v.gguf").read_bytes()
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x41
        (tmp_path / "bad.gguf").write_bytes(damaged)
        with suppress(VectorError):
            import_file(tmp_path / "bad.gguf", warn=quiet)


@pytest.mark.parametrize("name", ["v.gguf", "glp.gguf", "v.f32", "v.safetensors"])
def test_a_full_disk_during_export_loses_nothing(tmp_path: Path, monkeypatch, name: str) -> None:
    op, site = ("project", "ffn_out") if name in ("glp.gguf", "v.f32") else ("add", "residual")
    vector = SteeringVector.from_arrays({2: unit(2)}, op=op, site=site, n_layers=LAYERS)
    format = "glp" if name == "glp.gguf" else None
    export_file(vector, tmp_path / name, format, warn=quiet)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for target, what in (
        (Path, "write_bytes"),
        (gguf.GGUFWriter, "write_tensors_to_file"),
        (Path, "replace"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, what, full)
            if what == "write_bytes" and name.endswith(".gguf"):
                continue
            if what == "write_tensors_to_file" and not name.endswith(".gguf"):
                continue
            with pytest.raises(MlxsteerError, match="No space left") as caught:
                export_file(2 * vector, tmp_path / name, format, warn=quiet)
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_options_that_contradict_the_file_are_refused(tmp_path: Path) -> None:
    ds4 = write_ds4(tmp_path / "v.f32", ROWS[:LAYERS])
    for told, says in (
        ({"op": "add"}, "--op project, not add"),
        ({"site": "attn_out"}, "--site ffn_out, not attn_out"),
        ({"n_layers": 7}, "--n-layers 6, not 7"),
        ({"layers": [9]}, "no layer 9"),
    ):
        with pytest.raises(VectorError, match=says):
            import_file(ds4, **told)
    assert import_file(ds4, layers=[1, 2], name="brief").layers == (1, 2)
    assert import_file(ds4, name="brief").name == "brief"
    with pytest.raises(UsageError, match="Leave it out"):
        import_file(ds4, gguf_base="generator")
    (tmp_path / "v.txt").write_text("hello")
    with pytest.raises(VectorError, match="of no known format"):
        import_file(tmp_path / "v.txt")
    with pytest.raises(VectorError, match="There is no file"):
        import_file(tmp_path / "none.gguf")


def test_a_remark_nobody_takes_is_a_python_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="suggests α = 2"):
        import_file(write_glp(tmp_path / "v.gguf"))


# --- behaviour --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> llama.Model:
    mx.random.seed(0)
    sizes = {"hidden_size": D, "num_hidden_layers": LAYERS, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
    args = llama.ModelArgs("llama", rms_norm_eps=1e-5, **sizes, **heads)
    model = llama.Model(args)
    mx.eval(model.parameters())
    return model


TOKENS = mx.array([[3, 7, 1, 30, 22, 9]])


def by_hand(model: llama.Model, edit) -> np.ndarray:
    """Logits of a loop over the blocks; `edit(layer, site, y)` is the formula, in numpy."""

    def edited(layer: int, site: str, y: mx.array) -> mx.array:
        return mx.array(edit(layer, site, np.array(y)).astype(np.float32))

    inner = model.model
    h = inner.embed_tokens(TOKENS)
    mask = create_attention_mask(h, None)
    for layer, block in enumerate(inner.layers):
        attn = block.self_attn(block.input_layernorm(h), mask, None)
        h = h + edited(layer, "attn_out", attn)
        ffn = block.mlp(block.post_attention_layernorm(h))
        h = edited(layer, "residual", h + edited(layer, "ffn_out", ffn))
    h = inner.norm(h)
    logits = inner.embed_tokens.as_linear(h) if model.args.tie_word_embeddings else model.lm_head(h)
    return np.array(logits)


def steered(model: llama.Model, vector: SteeringVector, amount: float, unit: str = ""):
    """Logits through the plan, the batch edits and the hooks."""
    hooks = adapters.install(model)
    shape = ModelShape("tiny", LAYERS, D, lambda: np.ones(LAYERS, np.float32), {})
    plan = build([(Term("v", amount, unit), vector)], shape)
    hooks.require(plan.places)
    edits = Stacker().edits([plan], np.full(TOKENS.shape, PROMPT))
    with hooks.forward(Run(edits=edits)):
        return np.array(model(TOKENS))


def check_equal(network, vector, amount, unit, edit) -> None:
    plain = by_hand(network, lambda _layer, _site, y: y)
    expected = by_hand(network, edit)
    got = steered(network, vector, amount, unit)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert np.abs(expected - plain).max() > 1e-2, "the edit must change something to prove it"


@pytest.mark.parametrize("scale", [1.0, -1.0, -2.5, 0.3])
@pytest.mark.parametrize("component", ["ffn_out", "attn_out"])
def test_an_imported_ds4_vector_acts_by_its_formula(tmp_path, network, component, scale) -> None:
    rows = unit(4, LAYERS, D)
    vector = import_file(write_ds4(tmp_path / "v.f32", rows, component=component))

    def formula(layer: int, site: str, y: np.ndarray) -> np.ndarray:
        if site != component:
            return y
        d = rows[layer].astype(np.float64)
        return y - scale * (y @ d)[..., None] * d

    check_equal(network, vector, -scale, "", formula)


@pytest.mark.parametrize("alpha", [1.0, 2.0, -0.7])
@pytest.mark.parametrize("rank", [1, 3])
def test_an_imported_glp_projection_acts_by_its_formula(tmp_path, network, alpha, rank) -> None:
    bases = {
        n: np.linalg.qr(np.random.default_rng(n).normal(size=(D, rank)))[0].T.astype(np.float32)
        for n in (1, 2, 4)
    }
    tensors = {
        f"direction.{n}.{j}" if j else f"direction.{n}": row
        for n, rows in bases.items()
        for j, row in enumerate(rows)
    }
    version = {"glp.rank": rank, "glp.spec_version": 1 if rank == 1 else 2}
    path = write_glp(tmp_path / "v.gguf", tensors, **version)
    vector = import_file(path, warn=quiet)

    def formula(layer: int, site: str, h: np.ndarray) -> np.ndarray:
        if site != "residual" or layer not in bases:
            return h
        return h - alpha * sum((h @ d)[..., None] * d for d in bases[layer].astype(np.float64))

    check_equal(network, vector, alpha, "", formula)


@pytest.mark.parametrize("scale", [1.0, -1.5])
def test_an_imported_control_vector_acts_as_in_llama_cpp(tmp_path, network, scale) -> None:
    path = write_gguf(tmp_path / "v.gguf", directions(range(1, LAYERS), 0.5 * ROWS))
    added = llama_cpp_adds(path)

    def formula(layer: int, site: str, h: np.ndarray) -> np.ndarray:
        return h + scale * added[layer] if site == "residual" and layer in added else h

    check_equal(network, import_file(path), scale, "r", formula)
