"""Loading: a folder that is broken or unsafe is refused by name; types and stamps."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model

from mlxsteer.errors import ModelError
from mlxsteer.models import loading, memory
from mlxsteer.models.loading import load_model_and_tokenizer
from mlxsteer.models.stamp import model_stamp, quantization_text, weights_fingerprint
from tests.tiny import CONFIG, edit_json, make_folder

AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
V4_FIXTURES = Path(__file__).parent / "fixtures" / "v4"
TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7]])

on_cpu = pytest.mark.skipif(mx.metal.is_available(), reason="the CPU backend's own choices")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "tiny-llama")


# Folders that cannot be loaded


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit(file="config.json", **changes):
    return lambda folder: edit_json(folder / file, **changes)


def pickles_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\x00")


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"abcd")


def adapter_only(folder):
    (folder / "model.safetensors").rename(folder / "adapters.safetensors")


def shard_missing(folder):
    edit_json(folder / "model.safetensors.index.json", weight_map={"x": "model-00002.safetensors"})


def other_weights(folder):
    mx.save_safetensors(str(folder / "model.safetensors"), {"model.other": mx.zeros((2, 2))})


def broken_config(folder):
    (folder / "config.json").write_text("{\n  'model_type'")


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "no config.json"),
        (remove("tokenizer.json"), "no tokenizer"),
        (remove("model.safetensors"), "no weights"),
        (pickles_only, "pickles only"),
        (adapter_only, "adapters.safetensors"),
        (broken_config, "not valid JSON"),
        (edit(model_type=None), "model_type"),
        (edit(model_type="lama"), "'lama' is not one .* Did you mean 'llama'"),
        (edit(model_type="deepseek_v41"), r"V4\.1 .*V4-Flash or -Pro folder"),
        (edit(model_type="deepseek_v41_text"), r"V4\.1"),
        (edit(hidden_size=None), "cannot be loaded"),
        (edit(hidden_size=128), "cannot be loaded"),
        (edit(auto_map={"AutoConfig": "evil.C"}), "never runs code"),
        (edit(model_file="evil.py"), "never runs code"),
        (edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}), "never runs"),
        (cut_weights, "cut short"),
        (cut_header, "cut short"),
        (not_safetensors, "not a safetensors file"),
        (shard_missing, "model-00002.safetensors"),
        (other_weights, "cannot be loaded"),
        (broken_tokenizer, "cannot be loaded"),
    ],
)
def test_damaged_folder_is_refused(folder, damage, message):
    (folder / "evil.py").write_text("raise SystemExit('code from a checkpoint was run')")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_model_and_tokenizer(folder)


# Types


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(TOKENS).astype(mx.float32))


def dtypes(model: nn.Module) -> set[mx.Dtype]:
    return {array.dtype for _, array in tree_flatten(model.parameters())}


@on_cpu
def test_half_precision_weights_are_computed_in_float32_on_cpu(tmp_path):
    folder = make_folder(tmp_path / "half", dtype=mx.bfloat16)
    loaded = load_model_and_tokenizer(folder)
    assert loaded.dtype == "float32"
    assert dtypes(loaded.model) == {mx.float32}


@on_cpu
@pytest.mark.parametrize(
    "quantize",
    [
        AFFINE,
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    ],
    ids=lambda settings: settings["mode"],
)
def test_unpacking_on_cpu_changes_no_logit_beyond_rounding(tmp_path, quantize):
    folder = make_folder(tmp_path / "packed", quantize=quantize)
    packed, _ = load_model(folder)
    loaded = load_model_and_tokenizer(folder)
    assert dtypes(loaded.model) == {mx.float32}
    np.testing.assert_allclose(logits(loaded.model), logits(packed), rtol=0, atol=1e-4)


@on_cpu
def test_weights_stay_packed_where_memory_is_short(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "packed", quantize=AFFINE)
    monkeypatch.setattr(memory, "fits", lambda need, limit=None: False)
    loaded = load_model_and_tokenizer(folder, force=True)
    assert isinstance(loaded.model.model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert loaded.dtype == "float32"


def test_experts_stay_packed():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = SwitchLinear(32, 32, 4)
            self.dense = nn.Linear(32, 32, bias=True)

    block = Block()
    nn.quantize(block, group_size=32)
    bias = block.dense.bias
    assert loading.unpack_where_it_fits(block, CONFIG)
    assert block.experts.weight.dtype == mx.uint32
    assert block.dense.weight.dtype == mx.float32
    assert mx.array_equal(block.dense.bias, bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_given_dtype_casts_scales_and_never_packed_weights(tmp_path, dtype):
    folder = make_folder(tmp_path / "packed", quantize=AFFINE)
    stored, _ = load_model(folder)
    loaded = load_model_and_tokenizer(folder, dtype=dtype)
    assert loaded.dtype == dtype
    assert dtypes(loaded.model) == {mx.uint32, getattr(mx, dtype)}
    ours, theirs = loaded.model.model.embed_tokens, stored.model.embed_tokens
    assert mx.array_equal(ours.weight, theirs.weight)


def test_parameters_that_a_model_pins_are_widened_and_never_narrowed():
    class Pinned(nn.Linear):
        @property
        def cast_predicate(self):
            return lambda path: "bias" not in path

    model = Pinned(4, 4)
    loading.cast_floats(model, mx.float16)
    assert (model.weight.dtype, model.bias.dtype) == (mx.float16, mx.float32)
    model.bias = model.bias.astype(mx.bfloat16)
    loading.cast_floats(model, mx.float32)
    assert (model.weight.dtype, model.bias.dtype) == (mx.float32, mx.float32)


@on_cpu
def test_experts_in_half_precision_are_refused_on_cpu(folder, monkeypatch):
    class Mixture(llama.Model):
        def __init__(self, args):
            super().__init__(args)
            for layer in self.model.layers:
                layer.mlp.gate_proj = SwitchLinear(32, 64, 4, bias=False)

        def sanitize(self, weights):
            shape = self.model.layers[0].mlp.gate_proj.weight.shape
            experts = {name: mx.zeros(shape) for name in weights if "gate_proj" in name}
            return {**weights, **experts}

    monkeypatch.setattr(loading, "model_classes", lambda config: (Mixture, llama.ModelArgs))
    load_model_and_tokenizer(folder)
    with pytest.raises(ModelError, match="float32 only"):
        load_model_and_tokenizer(folder, dtype="bfloat16")


def test_unknown_dtype_gets_a_near_match(folder):
    with pytest.raises(ModelError, match="Did you mean 'float16'"):
        load_model_and_tokenizer(folder, dtype="flaot16")


def test_activation_rounding_is_refused_where_there_is_none(folder):
    with pytest.raises(ModelError, match=r"tiny-llama \(llama\) has none"):
        load_model_and_tokenizer(folder, activation_rounding=False)


def test_activation_rounding_reaches_the_models_arguments(folder, monkeypatch):
    @dataclass
    class Args(llama.ModelArgs):
        activation_rounding: bool = True

    monkeypatch.setattr(loading, "model_classes", lambda config: (llama.Model, Args))
    assert load_model_and_tokenizer(folder).model.args.activation_rounding is True
    loaded = load_model_and_tokenizer(folder, activation_rounding=False)
    assert loaded.model.args.activation_rounding is False


@pytest.mark.parametrize("name", ["tiny_fp32", "tiny_fp8fp4"])
def test_v4_folder_loads_through_our_own_module(folder, name):
    golden = np.load(V4_FIXTURES / f"{name}.npz")
    for file in (V4_FIXTURES / name).iterdir():
        shutil.copyfile(file, folder / file.name)
    loaded = load_model_and_tokenizer(folder, dtype="float32", activation_rounding=False)
    ours = np.array(loaded.model(mx.array(golden["ids"].reshape(1, -1)))[0])
    np.testing.assert_allclose(ours, golden["logits"], rtol=0, atol=1e-4)


def test_a_portable_v4_folder_loads_in_our_module_and_its_code_is_never_run(folder):
    for file in (V4_FIXTURES / "tiny_fp32").iterdir():
        shutil.copyfile(file, folder / file.name)
    (folder / "portable.py").write_text("raise SystemExit('run')")
    edit_json(folder / "config.json", model_file="portable.py")
    loaded = load_model_and_tokenizer(folder, dtype="float32", activation_rounding=False)
    assert type(loaded.model).__module__.startswith("mlxsteer.models.deepseek_v4")


# Stamps


def test_stamp_names_the_model(tmp_path):
    folder = make_folder(tmp_path / "packed", quantize=AFFINE)
    loaded = load_model_and_tokenizer(folder)
    stamp = model_stamp(folder, loaded.config, loaded.tokenizer, "abc", "someone/tiny")
    assert stamp["base_model"] == "someone/tiny"
    assert stamp["base_revision"] == "abc"
    assert stamp["architecture"] == "llama"
    assert stamp["quantization"] == "4-bit affine, groups of 32"
    assert (stamp["d_model"], stamp["n_layers"]) == (64, 2)
    assert all(len(stamp[key]) == 64 for key in stamp if key.endswith(("sha256", "fingerprint")))


def test_stamp_looks_inside_nested_configs(folder):
    config = {"model_type": "mistral3", "text_config": {"hidden_size": 8, "num_hidden_layers": 3}}
    stamp = model_stamp(folder, config, None, None, "x")
    assert (stamp["d_model"], stamp["n_layers"]) == (8, 3)
    assert stamp["quantization"] is None
    assert stamp["chat_template_sha256"] is None


def test_fingerprint_tells_other_weights_apart(folder):
    before = weights_fingerprint(folder)
    assert weights_fingerprint(folder) == before
    weights = mx.load(str(folder / "model.safetensors"))
    other = {name: array + 1 for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), other)
    assert weights_fingerprint(folder) != before


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, None),
        ({"quantization": AFFINE}, "4-bit affine, groups of 32"),
        (
            {"quantization": {**AFFINE, "lm_head": {**AFFINE, "bits": 8}}},
            "4-bit affine, groups of 32, mixed",
        ),
        ({"quantization": {**AFFINE, "lm_head": False}}, "4-bit affine, groups of 32, mixed"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ],
)
def test_quantization_text(config, text):
    assert quantization_text(config) == text
