"""What identifies a model in a vector file, so that a vector meets only the model it fits.

Reads a folder's config, headers and a few sampled bytes; never the whole of the weights. It
does not decide what a mismatch means.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mlxsteer.models.folder import read_header, text_config, weight_files

SAMPLES = 16
SAMPLE_BYTES = 4096


def model_stamp(
    path: Path,
    config: dict[str, Any],
    tokenizer: Any,
    revision: str | None,
    label: str,
) -> dict[str, Any]:
    """The identity of the model in `path`, as plain JSON values.

    `d_model` and `n_layers` are the language model's, also inside a multimodal config.
    """
    text = text_config(config)
    return {
        "base_model": label,
        "base_revision": revision,
        "architecture": config["model_type"],
        "config_sha256": config_sha256(path),
        "weights_fingerprint": weights_fingerprint(path),
        "quantization": quantization_text(config),
        "chat_template_sha256": _template_sha256(tokenizer),
        "d_model": text.get("hidden_size"),
        "n_layers": text.get("num_hidden_layers"),
    }


def config_sha256(path: Path) -> str:
    """Of config.json's values, so that reformatting the file changes nothing."""
    values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(path: Path) -> str:
    """SHA-256 over each weight file's header, size and 16 evenly spaced pieces of 4 KiB.

    Tells other weights, another quantisation or another sharding apart while reading less than
    0.1 MB a file. It is no checksum: a change that misses every sample goes unseen.
    """
    digest = hashlib.sha256()
    for file in weight_files(path):
        header, _ = read_header(file)
        size = file.stat().st_size
        digest.update(header)
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            for sample in range(SAMPLES):
                stream.seek(8 + len(header) + (size - 8 - len(header)) * sample // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def quantization_text(config: dict[str, Any]) -> str | None:
    """`4-bit affine, groups of 32`, `..., mixed` when some layers differ; None when unquantised."""
    settings = config.get("quantization") or text_config(config).get("quantization_config")
    if not isinstance(settings, dict):
        return None
    if "bits" not in settings:
        return str(settings.get("quant_method") or "unknown")
    common = {key: settings.get(key) for key in ("bits", "group_size", "mode")}
    common["mode"] = common["mode"] or "affine"
    others = [value for value in settings.values() if _differs(value, common)]
    text = f"{common['bits']}-bit {common['mode']}, groups of {common['group_size']}"
    return f"{text}, mixed" if others else text


def _differs(value: Any, common: dict[str, Any]) -> bool:
    """Whether a per-layer entry (settings, or False for unquantised) departs from the rest."""
    if isinstance(value, dict):
        return any(value.get(key, common[key]) != common[key] for key in common)
    return value is False


def _template_sha256(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    if not isinstance(template, str):
        template = json.dumps(template, sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()
