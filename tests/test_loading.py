"""Names find the model they mean, and a folder that is broken or unsafe is refused by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from huggingface_hub import errors as hub_errors
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model

from mlxsteer.errors import ModelError
from mlxsteer.models import demo, loading, memory
from mlxsteer.models.loading import load_model_and_tokenizer
from mlxsteer.models.names import resolve_model
from mlxsteer.models.stamp import model_stamp, quantization_text, weights_fingerprint
from tests.tiny import CONFIG, edit_json, make_folder

AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
V4_FIXTURES = Path(__file__).parent / "fixtures" / "v4"
TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7]])

on_cpu = pytest.mark.skipif(mx.metal.is_available(), reason="the CPU backend's own choices")


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty cache and home folders, and an empty working directory."""
    for name in ("CACHE", "HOME"):
        monkeypatch.setenv(f"MLXSTEER_{name}", str(tmp_path / name.lower()))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "tiny-llama")


def write_settings(homes: Path, text: str) -> None:
    (homes / "home").mkdir(exist_ok=True)
    (homes / "home" / "config.yaml").write_text(text)


def make_v4_folder(homes: Path, name: str = "DeepSeek-V4-Flash-mlx") -> Path:
    path = homes / "cache" / "models" / name
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "deepseek_v4"}')
    return path


# Names


def test_resolving_does_not_import_mlx():
    code = (
        "import sys; from mlxsteer.models.names import resolve_model; resolve_model('.');"
        "sys.exit('mlx.core' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_folder_is_itself(homes, folder):
    found = resolve_model(str(folder))
    assert (found.path, found.label, found.alias) == (folder, "tiny-llama", None)


def test_without_a_name_the_demo_is_used_and_said(homes, monkeypatch):
    monkeypatch.setattr(demo, "demo_path", demo.demo_folder)
    found = resolve_model(None)
    assert found.alias == "demo"
    assert "demo model" in found.why


def test_without_a_name_a_converted_v4_flash_comes_before_the_demo(homes):
    path = make_v4_folder(homes)
    found = resolve_model(None)
    assert (found.path, found.alias) == (path, "v4-flash")
    assert str(path) in found.why


def test_without_a_name_the_users_default_comes_first(homes, folder):
    make_v4_folder(homes)
    write_settings(homes, f"model: {folder}\n")
    found = resolve_model(None)
    assert found.path == folder
    assert "config.yaml" in found.why


def test_users_aliases_name_folders(homes, folder):
    write_settings(homes, f"aliases:\n  v4-flash: {folder}\n  mine: demo\n")
    assert resolve_model("v4-flash").path == folder
    assert resolve_model(None).path == folder


def test_v4_flash_without_a_folder_says_to_convert(homes):
    with pytest.raises(ModelError, match="mlxsteer convert"):
        resolve_model("v4-flash")


def test_an_unfinished_v4_folder_is_not_found(homes):
    (make_v4_folder(homes) / "config.json").write_text("{")
    with pytest.raises(ModelError, match="mlxsteer convert"):
        resolve_model("v4-flash")


def test_demo_is_not_fetched_when_downloads_are_off(homes):
    with pytest.raises(ModelError, match="models pull demo"):
        resolve_model("demo", allow_download=False)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("dmeo", "'demo'"), ("v4flash", "'v4-flash'"), ("./tiny-lama", "'tiny-llama'")],
)
def test_typos_get_near_matches(homes, typed, meant):
    Path("tiny-llama").mkdir()
    with pytest.raises(ModelError, match=f"Did you mean {meant}"):
        resolve_model(typed)


def test_a_file_points_to_its_folder(homes, folder):
    with pytest.raises(ModelError, match="Give the model's folder"):
        resolve_model(str(folder / "config.json"))


@pytest.mark.parametrize("text", ["model: [", "- demo\n", "aliases: demo\n"])
def test_broken_settings_are_named(homes, text):
    write_settings(homes, text)
    with pytest.raises(ModelError, match=r"config\.yaml"):
        resolve_model(None)


# The Hub, through a stand-in for the client's one function


@pytest.fixture
def repo(homes, folder, monkeypatch) -> Path:
    """The files of a repo, and a `snapshot_download` that copies what is asked for."""
    (folder / "modeling.py").write_text("")
    (folder / "pytorch_model.bin").write_bytes(b"")
    snapshot = homes / "hub" / "snapshots" / "0123abcd"

    def download(repo, *, allow_patterns, local_files_only):
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


def test_hub_repo_comes_without_code_or_pickles(repo):
    found = resolve_model("someone/tiny-llama")
    assert (found.label, found.revision) == ("someone/tiny-llama", "0123abcd")
    names = {file.name for file in found.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"modeling.py", "pytorch_model.bin"} & names


def test_hub_repo_that_wants_code_is_refused_before_its_weights_come(repo, homes):
    edit_json(repo / "config.json", auto_map={"AutoModel": "modeling.X"})
    with pytest.raises(ModelError, match="never runs code"):
        resolve_model("someone/tiny-llama")
    assert not (homes / "hub/snapshots/0123abcd/model.safetensors").exists()


def test_hub_repo_of_a_refused_architecture_is_not_fetched(repo, homes):
    edit_json(repo / "config.json", model_type="deepseek_v41")
    with pytest.raises(ModelError, match=r"V4\.1"):
        resolve_model("someone/DeepSeek-V4.1")
    assert not (homes / "hub/snapshots/0123abcd/model.safetensors").exists()


def test_hub_repo_of_pickles_is_refused(repo):
    (repo / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors"):
        resolve_model("someone/tiny-llama")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (hub_errors.RepositoryNotFoundError, "no repo of that name"),
        (hub_errors.GatedRepoError, "hf auth login"),
        (hub_errors.LocalEntryNotFoundError, "cannot be reached"),
        (hub_errors.IncompleteSnapshotError, "cannot be reached"),
        (OSError, "Cannot fetch"),
    ],
)
def test_hub_failures_say_what_to_do(homes, monkeypatch, kind, message):
    def fail(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        resolve_model("someone/model")


def test_hub_repo_that_is_not_here_names_the_pull_command(homes):
    with pytest.raises(ModelError, match="mlxsteer models pull someone/model"):
        resolve_model("someone/model", allow_download=False)


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
