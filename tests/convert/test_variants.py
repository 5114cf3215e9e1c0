"""The checkpoints that exist beside the preview, and converted folders as sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.formats import Format
from mlxsteer.convert.layout import model_layout
from mlxsteer.convert.recipes import EXPERTS, Recipe, Rule
from tests.convert import reference, synthetic
from tests.convert.conftest import TINY, run

SMALL = synthetic.small_config()


def test_0731_and_its_three_draft_stages(tmp_path: Path) -> None:
    """Longer compress_ratios, dspark keys, mtp.0 to mtp.2 with tensors of their own."""
    settings = synthetic.small_config(
        compress_ratios=[0, 4, 128, 4, 0, 0, 0],
        dspark_block_size=5,
        dspark_target_layer_ids=[0, 1, 2],
    )

    def stages(tensors: list[synthetic.Tensor]) -> list[synthetic.Tensor]:
        drafts = [t for t in tensors if t[0].startswith("mtp.0.")]
        more = [(n.replace("mtp.0", f"mtp.{i}"), d, s) for i in (1, 2) for n, d, s in drafts]
        own = [("mtp.2.markov_head.markov_w1.weight", "BF16", (8, 4))] if drafts else []
        return [*tensors, *more, *own]

    source = synthetic.write(tmp_path / "source", settings, stages)
    run(source, tmp_path / "out")
    plain = synthetic.write(tmp_path / "plain", SMALL)
    run(plain, tmp_path / "preview")
    names = reference.load_folder(tmp_path / "out").keys()
    assert names == reference.load_folder(tmp_path / "preview").keys()
    assert not any("mtp" in name for name in names)


def test_a_download_without_the_draft_shard_is_complete(tmp_path: Path) -> None:
    source = synthetic.write(tmp_path / "source", SMALL)
    (source / "model-00006-of-00006.safetensors").unlink()
    run(source, tmp_path / "out")


def test_base_with_float32_scales_is_not_lossless_and_says_so(tmp_path: Path) -> None:
    source = synthetic.write(tmp_path / "source", SMALL, synthetic.float32_scales)
    with pytest.raises(ConvertError, match="float32 scales, which MLX cannot hold bit for bit"):
        run(source, tmp_path / "out")


def test_base_with_float32_scales_is_decoded_and_quantised(tmp_path: Path) -> None:
    source = synthetic.write(tmp_path / "source", SMALL, synthetic.float32_scales)
    result = run(source, tmp_path / "out", "q3")
    before = reference.load_folder(source)
    after = reference.load_folder(tmp_path / "out")
    path = "model.layers.1.attn.wq_b"
    parts = [after[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
    ours = reference.affine_matrix(*parts, bits=8, group=64)
    expected = reference.source_matrix(before, "layers.1.attn.wq_b")
    error = np.sqrt(((ours - expected) ** 2).sum() / (expected**2).sum())
    assert error < 0.01
    assert result.errors["attention"]["error"] < 0.01
    assert result.errors["experts"]["error"] < 0.35


def test_fp8_repacks_of_the_experts_are_lossless_in_8_bits(tmp_path: Path) -> None:
    source = synthetic.write(tmp_path / "source", SMALL, synthetic.fp8_experts)
    run(source, tmp_path / "out")
    before = reference.load_folder(source)
    after = reference.load_folder(tmp_path / "out")
    path = "model.layers.2.ffn.switch_mlp.down_proj"
    ours = reference.mx_matrix(after[f"{path}.weight"], after[f"{path}.scales"], 8)
    for e in range(8):
        name = f"layers.2.ffn.experts.{e}.w2"
        np.testing.assert_array_equal(ours[e], reference.source_matrix(before, name))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"][path]["mode"] == "mxfp8"


def test_dense_checkpoints_keep_their_floats(tmp_path: Path) -> None:
    def dense(tensors: list[synthetic.Tensor]) -> list[synthetic.Tensor]:
        wide = [t for t in tensors if not t[0].endswith(".scale")]
        return [_dense(*t) for t in wide]

    source = synthetic.write(tmp_path / "source", SMALL, dense)
    run(source, tmp_path / "out")
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    before, after = reference.load_folder(source), reference.load_folder(tmp_path / "out")
    stacked = after["model.layers.0.ffn.switch_mlp.up_proj.weight"]
    for e in range(8):
        np.testing.assert_array_equal(stacked[e], before[f"layers.0.ffn.experts.{e}.w3.weight"])


def _dense(name: str, dtype: str, shape: tuple[int, ...]) -> synthetic.Tensor:
    if dtype == "I8":
        return (name, "BF16", (shape[0], shape[1] * 2))
    return (name, "BF16" if dtype == "F8_E4M3" else dtype, shape)


@pytest.mark.parametrize("recipe", ["q3", "q2", "q2-fast"])
def test_a_converted_folder_gives_the_smaller_recipe_bit_for_bit(
    recipe: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Lossless in between loses nothing: the same bytes as from the official weights."""
    run(converted("lossless"), tmp_path / "again", recipe)
    direct = reference.load_folder(converted(recipe))
    again = reference.load_folder(tmp_path / "again")
    assert direct.keys() == again.keys()
    for name in direct:
        np.testing.assert_array_equal(direct[name], again[name])


def test_a_converted_folder_copies_itself(converted: Callable[[str], Path], tmp_path: Path) -> None:
    run(converted("q2-fast"), tmp_path / "copy")
    before, after = (reference.load_folder(f) for f in (converted("q2-fast"), tmp_path / "copy"))
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    configs = [json.loads((f / "config.json").read_text()) for f in
               (converted("q2-fast"), tmp_path / "copy")]  # fmt: skip
    assert configs[0] == configs[1]


def test_affine_folders_requantise_to_fewer_bits(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = Recipe("smaller", "", (Rule(EXPERTS, Format("affine", 2, 128)),))
    errors = run(converted("q3"), tmp_path / "out", recipe).errors
    assert 0.05 < errors["experts"]["error"] < errors["experts"]["mlx_error"]


def test_grouped_output_projection_is_stacked_by_groups(converted: Callable[[str], Path]) -> None:
    config = json.loads((TINY / "config.json").read_text())
    after = reference.load_folder(converted("lossless"))
    matrix = next(
        m for u in model_layout(config) for m in u.matrices if m.path.endswith("1.attn.wo_a")
    )
    assert matrix.shape == (2, 128, 256)
    assert after[f"{matrix.path}.weight"].shape == (2, 128, 64)
    assert after[f"{matrix.path}.scales"].shape == (2, 128, 8)
