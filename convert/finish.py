"""The small files around the weights: config, index, tokenizer, card, record of the conversion.

They are written when every shard is in place, so a folder with a config.json is a whole model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from mlxsteer.convert.card import model_card
from mlxsteer.convert.checkpoint import INDEX_NAME
from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.formats import MXFP4, Format
from mlxsteer.convert.journal import ShardRecord
from mlxsteer.convert.plan import Plan
from mlxsteer.convert.sources import RECORD_NAME, Source
from mlxsteer.files import atomic_path, write_text
from mlxsteer.models.deepseek_v4.chat_format import chat_template

ErrorTable = dict[str, dict[str, float]]


def finish(
    source: Source,
    plan: Plan,
    out: Path,
    shards: Mapping[str, ShardRecord],
    importance: str,
) -> ErrorTable:
    """Write everything but the weights; `conversion.json`, which marks completion, last."""
    record = make_record(plan, shards, importance)
    for name in plan.checkpoint.side_files:
        _copy(source.side_file(name), out / name)
    if "chat_template.jinja" not in plan.checkpoint.side_files:
        write_text(out / "chat_template.jinja", _template(plan.checkpoint.config))
    write_text(out / INDEX_NAME, json.dumps(weight_index(plan), indent=1) + "\n")
    write_text(out / "README.md", model_card(plan, record))
    write_text(out / "config.json", json.dumps(output_config(plan), indent=1) + "\n")
    write_text(out / RECORD_NAME, json.dumps(record, indent=1) + "\n")
    return record["errors"]


def output_config(plan: Plan) -> dict[str, Any]:
    """The source's config, with MLX's `quantization` map in place of its own.

    mlx-lm looks a module's path up in the map first; the sizes beside the paths are the default.
    """
    config = dict(plan.checkpoint.config)
    for key in ("quantization_config", "quantization"):
        config.pop(key, None)
    config["num_nextn_predict_layers"] = 0  # draft blocks are not converted
    paths = {
        planned.matrix.path: planned.target.as_config()
        for planned in plan.matrices()
        if isinstance(planned.target, Format)
    }
    if paths:
        config["quantization"] = {**MXFP4.as_config(), **paths}
    return config


def weight_index(plan: Plan) -> dict[str, Any]:
    """`model.safetensors.index.json`: which file holds which tensor."""
    places = {t.name: shard.filename for shard in plan.shards for t in shard.tensors}
    return {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(places.items()))}


def make_record(plan: Plan, shards: Mapping[str, ShardRecord], importance: str) -> dict[str, Any]:
    """Provenance that a machine can check: source, recipe, hashes, errors. No dates: the same
    source and recipe give the same bytes."""
    return {
        "fingerprint": plan.fingerprint,
        "source": plan.checkpoint.public_name,
        "revision": plan.checkpoint.revision,
        "recipe": plan.recipe.name,
        "importance": importance or None,
        "lossless": all(planned.exact for planned in plan.matrices()),
        "formats": _formats(plan),
        "errors": error_table(shards),
        "shards": {
            s.filename: {
                "nbytes": shards[s.filename].nbytes,
                "sha256": shards[s.filename].sha256,
            }
            for s in plan.shards
        },
    }


def error_table(shards: Mapping[str, ShardRecord]) -> ErrorTable:
    """Relative weighted RMS error per kind of matrix, beside that of `mx.quantize`."""
    sums: dict[str, list[float]] = {}
    for name in sorted(shards):
        for kind, values in shards[name].errors.items():
            row = sums.setdefault(kind, [0.0, 0.0, 0.0])
            sums[kind] = [a + b for a, b in zip(row, values, strict=True)]
    return {
        kind: {
            "error": sqrt(error / power) if power else 0.0,
            "mlx_error": sqrt(mlx / power) if power else 0.0,
        }
        for kind, (error, mlx, power) in sums.items()
    }


def _formats(plan: Plan) -> dict[str, list[str]]:
    """What each kind of matrix is stored as."""
    found: dict[str, set[str]] = {}
    for planned in plan.matrices():
        found.setdefault(planned.matrix.kind, set()).add(str(planned.target))
    return {kind: sorted(formats) for kind, formats in found.items()}


def _template(config: Mapping[str, Any]) -> str:
    """The template that the V4 module offers to other clients; the 0731 release has its own.

    Its draft keys tell that release: name and version of both configs are the same.
    """
    newer = any(key.startswith("dspark_") for key in config)
    return chat_template("0731" if newer else "preview")


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise ConvertError(f"{source} has disappeared. Restore it, then run the same command.")
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
