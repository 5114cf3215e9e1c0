"""Claims about ds4 files and bare arrays, and about what holds for every foreign format."""

from __future__ import annotations

import errno
import os
import pickle
from contextlib import suppress
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlxsteer.errors import MlxsteerError, UsageError, VectorError
from mlxsteer.formats import export_file, import_file
from mlxsteer.vector import SteeringVector
from tests.foreign_files import (
    LAYERS,
    ROWS,
    D,
    cosine,
    directions,
    quiet,
    unit,
    write_ds4,
    write_gguf,
    write_glp,
)

DS4_VERBOSITY = Path(
    os.environ.get("MLXSTEER_DS4_VERBOSITY")
    or Path(__file__).parents[2] / "shared" / "data" / "ds4-verbosity.f32"
)


# --- ds4 ------------------------------------------------------------------------------------------


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


# --- bare arrays ----------------------------------------------------------------------------------


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


# --- every format ---------------------------------------------------------------------------------


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
