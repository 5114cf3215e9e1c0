"""Files of sparse autoencoders: SAELens folders in and out, Gemma-Scope files in and out.

A SAELens folder is `cfg.json` with `sae_weights.safetensors`; since version 6 what is known of
the model lies under `metadata`, before it lay flat. Our own facts lie beside, in `mlxsteer.json`.
Gemma Scope is one `params.npz` (or `params.safetensors`) of a JumpReLU. Pickles are refused.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

import mlxsteer
from mlxsteer.errors import SaeError
from mlxsteer.files import atomic_path, write_text
from mlxsteer.sae.dictionary import ARCHITECTURES, Dictionary, Gate

CONFIG, WEIGHTS, FACTS = "cfg.json", "sae_weights.safetensors", "mlxsteer.json"
GEMMA_FILES = ("params.npz", "params.safetensors")
FORMATS = ("saelens", "saelens5", "gemma-scope")
SAELENS_VERSION = "6.0.0"  # whose layout we write
# Facts of the model that SAELens keeps; under `metadata` since version 6.
MODEL_FACTS = (
    "model_name",
    "hook_name",
    "hook_layer",
    "hook_head_index",
    "prepend_bos",
    "context_size",
    "dataset_path",
    "neuronpedia_id",
    "sae_lens_version",
    "sae_lens_training_version",
)
_HOOKS = {"residual": "resid_post", "ffn_out": "mlp_out", "attn_out": "attn_out"}
_LAYER = re.compile(r"layer_(\d+)")  # Gemma Scope's folders: layer_20/width_16k/…

Tensors = dict[str, mx.array]


def read(path: str | Path) -> Dictionary:
    """The dictionary in a SAELens folder, or in a Gemma-Scope folder or file.

    Raises SaeError, in one sentence, for anything missing, damaged or unknown.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise SaeError(f"There is nothing at {path}. Give a folder that holds {CONFIG}.")
    if path.is_file():
        if path.name in (CONFIG, WEIGHTS):
            return read(path.parent)
        return _read_gemma(path)
    if (path / CONFIG).is_file():
        return _read_saelens(path)
    for name in GEMMA_FILES:
        if (path / name).is_file():
            return _read_gemma(path / name)
    pickles = [p.name for p in path.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".pkl")]
    if pickles:
        raise SaeError(
            f"{path} holds a pickle ({pickles[0]}), which can run code when it is read, so it is"
            " refused. Where you trust it, save it there as safetensors with SAELens."
        )
    raise SaeError(
        f"{path} holds no dictionary: neither {CONFIG} (SAELens) nor {GEMMA_FILES[0]} (Gemma"
        " Scope). Give the folder of one layer."
    )


def write(dictionary: Dictionary, folder: str | Path, form: str = "saelens") -> Path:
    """Write `dictionary` into `folder`; returns the folder.

    form: `saelens` (version 6 and later), `saelens5` (before), `gemma-scope` (one params.npz).
    SAELens keeps a trained BatchTopK as a JumpReLU with one threshold, and so do we; what it
    was trained as stays in the facts. Raises SaeError for a form that cannot hold it.
    """
    folder = Path(folder).expanduser()
    if form not in FORMATS:
        raise SaeError(f"Unknown format {form!r}: {', '.join(FORMATS)}.")
    if form == "gemma-scope":
        return _write_gemma(dictionary, folder)
    config = _config(dictionary) if form == "saelens" else _flat_config(dictionary)
    with atomic_path(folder / WEIGHTS) as temporary:
        mx.save_safetensors(str(temporary), _tensors(dictionary), {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=1))
    own = {"created_with": f"mlxsteer {mlxsteer.__version__}", **dictionary.about}
    write_text(folder / FACTS, json.dumps(own, indent=1, ensure_ascii=False))
    return folder


# --- SAELens ----------------------------------------------------------------------------------


def _read_saelens(folder: Path) -> Dictionary:
    config = _modern(_json(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        raise SaeError(f"{folder} has {CONFIG} but no {WEIGHTS}. Get the folder again, whole.")
    tensors = _safetensors(folder / WEIGHTS)
    about = dict(config.get("metadata") or {})
    if (folder / FACTS).is_file():
        about |= _json(folder / FACTS)
    try:
        return _assemble(config, tensors, about)
    except SaeError as error:
        raise SaeError(f"{folder}: {error}") from None


def _modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of any version in the words of version 6."""
    old = {"hook_point": "hook_name", "hook_point_layer": "hook_layer"}
    new = {old.get(key, key): value for key, value in config.items()}
    metadata = new.get("metadata")
    if not isinstance(metadata, Mapping):
        new["metadata"] = {key: new[key] for key in MODEL_FACTS if new.get(key) is not None}
    function = new.get("activation_fn") or new.get("activation_fn_str")
    if function == "topk":
        new["architecture"] = "topk"
        new.setdefault("k", (new.get("activation_fn_kwargs") or {}).get("k"))
    elif function not in (None, "relu"):
        raise SaeError(f"Unknown activation function {function!r}: relu and topk can be read.")
    new.setdefault("architecture", "standard")
    normalise = new.get("normalize_activations") or "none"
    new["normalize_activations"] = (
        "expected_average_only_in" if normalise is True else str(normalise)
    )
    if str(new.get("reshape_activations") or "none") != "none":
        raise SaeError("It reads attention heads (hook_z), which no site of ours offers.")
    return new


def _assemble(config: Mapping[str, Any], tensors: Tensors, about: Mapping[str, Any]) -> Dictionary:
    architecture = str(config["architecture"])
    if architecture not in ARCHITECTURES:
        raise SaeError(
            f"Unknown architecture {architecture!r}: {', '.join(ARCHITECTURES)} can be read."
        )
    tensors = _checked_names(architecture, tensors)
    if config.get("rescale_acts_by_decoder_norm"):
        tensors = _with_unit_decoder(tensors)
    gate = None
    if architecture == "gated":
        gate = Gate(tensors["b_gate"], tensors["r_mag"], tensors["b_mag"])
    k = config.get("k")
    if architecture == "topk" and not isinstance(k, int | float):
        raise SaeError(f"A topk dictionary needs k, and {CONFIG} says {k!r}.")
    threshold = tensors.get("threshold")
    if architecture == "batchtopk" and "topk_threshold" in tensors:
        threshold = mx.broadcast_to(tensors["topk_threshold"], tensors["b_enc"].shape)
    dictionary = Dictionary(
        architecture=architecture,
        W_enc=tensors["W_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        b_enc=tensors.get("b_enc") if gate is None else None,
        threshold=threshold,
        k=int(k) if architecture == "topk" and k is not None else None,
        gate=gate,
        apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
        normalize_activations=str(config["normalize_activations"]),
        about=about,
    )
    _check_sizes(config, dictionary)
    return dictionary


def _checked_names(architecture: str, tensors: Tensors) -> Tensors:
    tensors = {name: array for name, array in tensors.items() if not _is_one(name, array)}
    needed = {"W_enc", "W_dec", "b_dec"}
    needed |= {"b_gate", "r_mag", "b_mag"} if architecture == "gated" else {"b_enc"}
    needed |= {"threshold"} if architecture == "jumprelu" else set()
    if missing := sorted(needed - set(tensors)):
        raise SaeError(f"A {architecture} dictionary needs {', '.join(missing)}: not in the file.")
    unknown = sorted(set(tensors) - needed - {"threshold", "topk_threshold", "b_enc"})
    if unknown:
        raise SaeError(f"The file holds {', '.join(unknown)}, whose use is not known here.")
    return tensors


def _is_one(name: str, array: mx.array) -> bool:
    """A scaling factor of ones, which old versions wrote and nothing uses."""
    names = ("scaling_factor", "finetuning_scaling_factor")
    return name in names and bool((array == 1).all())


def _with_unit_decoder(tensors: Tensors) -> Tensors:
    """The same autoencoder with the decoder's norms moved into the encoder."""
    norm = mx.linalg.norm(tensors["W_dec"], axis=-1)
    return tensors | {
        "W_enc": tensors["W_enc"] * norm,
        "b_enc": tensors["b_enc"] * norm,
        "W_dec": tensors["W_dec"] / norm[:, None],
    }


def _check_sizes(config: Mapping[str, Any], dictionary: Dictionary) -> None:
    said = (config.get("d_in"), config.get("d_sae"))
    found = (dictionary.d_model, dictionary.n_features)
    for what, value, actual in zip(("d_in", "d_sae"), said, found, strict=True):
        if value is not None and value != actual:
            raise SaeError(f"{CONFIG} says {what} {value}, but the weights have {actual}.")


def _tensors(dictionary: Dictionary) -> Tensors:
    d = dictionary
    named = {"W_enc": d.W_enc, "W_dec": d.W_dec, "b_dec": d.b_dec, "b_enc": d.b_enc}
    named |= {"threshold": d.threshold, **(vars(d.gate) if d.gate else {})}
    return {name: mx.contiguous(array) for name, array in named.items() if array is not None}


def _config(dictionary: Dictionary) -> dict[str, Any]:
    """cfg.json of version 6."""
    architecture = dictionary.architecture
    config: dict[str, Any] = {
        "architecture": "jumprelu" if architecture == "batchtopk" else architecture,
        "d_in": dictionary.d_model,
        "d_sae": dictionary.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.apply_b_dec_to_input,
        "normalize_activations": dictionary.normalize_activations,
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, **_model_facts(dictionary)},
    }
    if architecture == "topk":
        config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    return config


def _flat_config(dictionary: Dictionary) -> dict[str, Any]:
    """cfg.json as before version 6: facts of the model flat, topk an activation function."""
    config = _config(dictionary)
    del config["metadata"], config["reshape_activations"]
    facts = _model_facts(dictionary) | {"sae_lens_training_version": None}
    topk = config["architecture"] == "topk"
    config |= {
        "architecture": "standard" if topk else config["architecture"],
        "activation_fn_str": "topk" if topk else "relu",
        "activation_fn_kwargs": {"k": config.pop("k")} if topk else {},
        "finetuning_scaling_factor": False,
        "hook_layer": dictionary.layer,
        "hook_head_index": None,
    }
    config.pop("rescale_acts_by_decoder_norm", None)
    return config | facts


def _model_facts(dictionary: Dictionary) -> dict[str, Any]:
    about, site = dictionary.about, dictionary.site
    hook = about.get("hook_name")
    if hook is None and dictionary.layer is not None and site in _HOOKS:
        hook = f"blocks.{dictionary.layer}.hook_{_HOOKS[site]}"
    name = about.get("model_name") or about.get("model")
    kept = {key: about.get(key) for key in ("prepend_bos", "context_size", "dataset_path")}
    facts = {"model_name": name, "hook_name": hook, **kept}
    if dictionary.architecture == "batchtopk":
        facts["training_architecture"] = "batchtopk"
    return {key: value for key, value in facts.items() if value is not None}


# --- Gemma Scope ------------------------------------------------------------------------------


def _read_gemma(path: Path) -> Dictionary:
    """A JumpReLU whose encoder sees states as they are (Lieberum et al. 2024, appendix)."""
    if path.suffix == ".npz":
        tensors = _npz(path)
    elif path.suffix == ".safetensors":
        tensors = _safetensors(path)
    else:
        raise SaeError(
            f"{path} is no dictionary that can be read: give a SAELens folder, or a"
            f" {' or '.join(GEMMA_FILES)} of Gemma Scope."
        )
    renamed = {name.replace("w_", "W_"): array for name, array in tensors.items()}
    config = {
        "architecture": "jumprelu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
    }
    about = {"layer": int(found[1])} if (found := _LAYER.search(str(path))) else {}
    if (path.parent / FACTS).is_file():
        about |= _json(path.parent / FACTS)
    try:
        return _assemble(config, renamed, about)
    except SaeError as error:
        raise SaeError(f"{path}: {error}") from None


def _write_gemma(dictionary: Dictionary, folder: Path) -> Path:
    if dictionary.threshold is None or dictionary.normalize_activations != "none":
        raise SaeError(
            f"Gemma Scope's format holds a jumprelu or batchtopk dictionary without"
            f" normalisation, not {dictionary.architecture} with"
            f" {dictionary.normalize_activations}. Use --format saelens."
        )
    assert dictionary.b_enc is not None
    if dictionary.apply_b_dec_to_input:  # (x - b_dec) W + b = x W + (b - b_dec W)
        bias = dictionary.b_enc - dictionary.b_dec @ dictionary.W_enc
        dictionary = replace(dictionary, b_enc=bias, apply_b_dec_to_input=False)
    arrays = {name: np.array(array) for name, array in _tensors(dictionary).items()}
    with atomic_path(folder / GEMMA_FILES[0]) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    write_text(folder / FACTS, json.dumps(dict(dictionary.about), indent=1, ensure_ascii=False))
    return folder


# --- raw files --------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SaeError(f"{path} is no JSON that can be read ({error}). Get it again.") from None
    if not isinstance(value, dict):
        raise SaeError(f"{path} should hold one JSON object, not a {type(value).__name__}.")
    return value


def _npz(path: Path) -> Tensors:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: _float32(name, file[name]) for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SaeError(f"{path} is damaged or holds a pickle ({error}). Get it again.") from None


def _safetensors(path: Path) -> Tensors:
    """float32 tensors; numpy reads them, except bfloat16, which it does not know."""
    found: Tensors = {}
    try:
        with safe_open(str(path), framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                if file.get_slice(name).get_dtype() == "BF16":
                    array: Any = mx.load(str(path))
                    found[name] = array[name].astype(mx.float32)
                else:
                    found[name] = _float32(name, file.get_tensor(name))
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SaeError(f"{path} is damaged or not safetensors ({error}). Get it again.") from None
    return found


def _float32(name: str, array: np.ndarray) -> mx.array:
    if array.dtype.kind != "f":
        raise SaeError(f"{name} is {array.dtype}: the weights of a dictionary are real numbers.")
    return mx.array(array.astype(np.float32))
