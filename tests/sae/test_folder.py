"""Folders of sparse autoencoders, against files and values that the `sae-lens` package wrote.

`tests/oracles/sae_lens_files.py` made them; where the package is installed, it also reads what
we write.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxsteer.errors import SaeError
from mlxsteer.sae import folder
from mlxsteer.sae.dictionary import Dictionary

FIXTURES = Path(__file__).parent.parent / "fixtures" / "sae"
CASES = sorted(path.name for path in FIXTURES.iterdir())
WRITABLE = ("standard", "topk", "jumprelu", "gated", "layer-norm", "constant-norm")


def golden(name: str) -> dict[str, np.ndarray]:
    return load_file(FIXTURES / name / "golden.safetensors")


def copy_of(name: str, to: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, to / name))


def edit_config(path: Path, **changes: Any) -> Path:
    config = {**json.loads((path / "cfg.json").read_text()), **changes}
    (path / "cfg.json").write_text(json.dumps(config))
    return path


def edit_weights(path: Path, **changes: np.ndarray | None) -> Path:
    file = path / "sae_weights.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: array for name, array in tensors.items() if array is not None}, file)
    return path


@pytest.mark.parametrize("name", CASES)
def test_encode_and_decode_agree_with_sae_lens(name: str) -> None:
    expected = golden(name)
    dictionary = folder.read(FIXTURES / name)
    if "scale" in expected:
        dictionary = dictionary.with_input_scale(float(expected["scale"]))
    x = mx.array(expected["x"])
    acts = dictionary.encode(x)
    np.testing.assert_allclose(np.array(acts), expected["acts"], atol=1e-5)
    out = dictionary.decode(mx.array(expected["acts"]), like=x)
    np.testing.assert_allclose(np.array(out), expected["out"], atol=1e-5)
    assert 0 < (expected["acts"] > 0).mean() < 0.9


@pytest.mark.parametrize("name", ["standard", "topk", "jumprelu", "gated", "layer-norm"])
def test_a_few_features_read_as_among_all(name: str) -> None:
    dictionary = folder.read(FIXTURES / name)
    x = mx.array(golden(name)["x"])
    few = dictionary.encode(x, [7, 0, 19])
    np.testing.assert_allclose(few, np.array(dictionary.encode(x))[:, [7, 0, 19]], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("standard", (2, "residual")),
        ("old-standard", (1, "residual")),
        ("old-hook-point", (1, "residual")),
        ("batchtopk", (None, None)),
    ],
)
def test_the_hook_says_after_which_layer(name: str, place: tuple[int, str]) -> None:
    dictionary = folder.read(FIXTURES / name)
    assert (dictionary.layer, dictionary.site) == place


@pytest.mark.parametrize("form", ["saelens", "saelens5"])
@pytest.mark.parametrize("name", [*WRITABLE, "batchtopk"])
def test_what_is_written_reads_back_the_same(tmp_path: Path, name: str, form: str) -> None:
    before = folder.read(FIXTURES / name)
    after = folder.read(folder.write(before, tmp_path / "out", form))
    x = mx.array(golden(name)["x"])
    assert mx.array_equal(before.encode(x), after.encode(x))
    assert mx.array_equal(before.reconstruct(x), after.reconstruct(x))
    assert (after.layer, after.site) == (before.layer, before.site)


@pytest.mark.parametrize("form", ["saelens", "saelens5"])
@pytest.mark.parametrize("name", [*WRITABLE, "batchtopk"])
def test_sae_lens_reads_what_we_write(tmp_path: Path, name: str, form: str) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    torch = pytest.importorskip("torch")
    expected = golden(name)
    folder.write(folder.read(FIXTURES / name), tmp_path, form)
    sae = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        acts = sae.encode(torch.tensor(expected["x"]))
        out = sae.decode(acts)
    np.testing.assert_allclose(acts.numpy(), expected["acts"], atol=1e-5)
    np.testing.assert_allclose(out.numpy(), expected["out"], atol=1e-5)


def test_gemma_scope_holds_a_dictionary_that_takes_its_bias_off(tmp_path: Path) -> None:
    before = folder.read(FIXTURES / "jumprelu")
    assert before.apply_b_dec_to_input
    after = folder.read(folder.write(before, tmp_path / "layer_12", "gemma-scope"))
    assert not after.apply_b_dec_to_input
    x = mx.array(golden("jumprelu")["x"])
    np.testing.assert_allclose(after.encode(x), before.encode(x), atol=1e-5)
    np.testing.assert_allclose(after.reconstruct(x), before.reconstruct(x), atol=1e-5)


def test_gemma_scope_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(SaeError, match="--format saelens"):
        folder.write(folder.read(FIXTURES / "topk"), tmp_path, "gemma-scope")


def test_bfloat16_weights_are_read_in_float32(tmp_path: Path) -> None:
    path = copy_of("jumprelu", tmp_path)
    exact: dict[str, Any] = mx.load(str(path / "sae_weights.safetensors"))  # type: ignore[assignment]
    half = {name: array.astype(mx.bfloat16) for name, array in exact.items()}
    mx.save_safetensors(str(path / "sae_weights.safetensors"), half)
    read = folder.read(path)
    assert read.W_enc.dtype == mx.float32
    assert mx.array_equal(read.W_enc, half["W_enc"].astype(mx.float32))


def test_what_a_dictionary_is_about_survives(tmp_path: Path) -> None:
    tensors = folder.read(FIXTURES / "standard")
    about = {"model": "demo", "layer": 15, "site": "ffn_out", "recipe": {"k": 32}}
    ours = Dictionary("standard", tensors.W_enc, tensors.W_dec, tensors.b_dec, tensors.b_enc,
                      about=about)  # fmt: skip
    read = folder.read(folder.write(ours, tmp_path))
    assert (read.layer, read.site) == (15, "ffn_out")
    assert read.about["recipe"] == {"k": 32}
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.15.hook_mlp_out"


# --- what is refused --------------------------------------------------------------------------


def refused(path: Path, match: str) -> None:
    with pytest.raises(SaeError, match=match) as caught:
        folder.read(path)
    assert "\n" not in str(caught.value)


def test_refuses_a_shape_that_does_not_fit(tmp_path: Path) -> None:
    path = edit_weights(copy_of("standard", tmp_path), b_enc=np.zeros(19, np.float32))
    refused(path, r"b_enc has shape \[19\]")


def test_refuses_weights_that_are_no_numbers(tmp_path: Path) -> None:
    path = edit_weights(copy_of("standard", tmp_path), b_enc=np.zeros(20, np.int32))
    refused(path, "b_enc is int32")
    path = edit_weights(path, b_enc=np.full(20, np.nan, np.float32))
    refused(path, "NaN")


def test_refuses_a_missing_tensor(tmp_path: Path) -> None:
    refused(edit_weights(copy_of("jumprelu", tmp_path), threshold=None), "needs threshold")


def test_refuses_a_tensor_whose_use_is_unknown(tmp_path: Path) -> None:
    factor = np.full(20, 1.5, np.float32)
    refused(edit_weights(copy_of("standard", tmp_path), scaling_factor=factor), "scaling_factor")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": "temporal"}, "Unknown architecture 'temporal'"),
        ({"activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
        ({"d_sae": 4096}, "d_sae 4096"),
        ({"architecture": "topk"}, "needs k"),
    ],
)
def test_refuses_a_configuration_that_it_cannot_follow(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    refused(edit_config(copy_of("standard", tmp_path), **changes), match)


def test_refuses_files_that_are_damaged_or_absent(tmp_path: Path) -> None:
    path = copy_of("standard", tmp_path)
    refused(tmp_path / "nowhere", "nothing at")
    (path / "cfg.json").write_text("{")
    refused(path, "no JSON")
    (path / "cfg.json").write_text("[1]")
    refused(path, "one JSON object")
    shutil.copy(FIXTURES / "standard" / "cfg.json", path)
    (path / "sae_weights.safetensors").write_bytes(b"not a header")
    refused(path, "damaged")
    (path / "sae_weights.safetensors").unlink()
    refused(path, "no sae_weights")


def test_refuses_pickles(tmp_path: Path) -> None:
    (tmp_path / "sae.pt").write_bytes(b"\x80\x02")
    refused(tmp_path, "pickle")
    (tmp_path / "sae.pt").unlink()
    np.savez(tmp_path / "params.npz", W_enc=np.array([object()], dtype=object))
    refused(tmp_path, "holds a pickle")
    (tmp_path / "params.npz").write_bytes(b"PK\x03\x04 cut")
    refused(tmp_path, "damaged")


def test_a_normalised_dictionary_needs_the_states_to_decode() -> None:
    dictionary = folder.read(FIXTURES / "layer-norm")
    with pytest.raises(SaeError, match="like=states"):
        dictionary.decode(mx.zeros((1, 20)))


def test_a_feature_is_its_row_of_the_decoder() -> None:
    dictionary = folder.read(FIXTURES / "standard")
    one = mx.zeros((20,)).at[6].add(1.0)
    bias = dictionary.decode(mx.zeros((20,)))
    np.testing.assert_allclose(dictionary.feature(6), dictionary.decode(one) - bias, atol=1e-6)
    with pytest.raises(SaeError, match="0 to 19"):
        dictionary.feature(20)
