"""The model card of a result: what it is, how it was made, how to use it, its hashes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxsteer.convert.plan import Plan
from mlxsteer.convert.sizes import GIB, sizes

_HEAD = """---
library_name: mlx
license: mit
pipeline_tag: text-generation
{base}tags:
- mlx
- deepseek_v4
---

# {title}

{source} in MLX format, recipe `{recipe}`: {summary}.

    mlxsteer chat --model {folder}

{size:,} bytes ({gib:.1f} GiB); {read:.2f} GB of weights are read per decoded token. Draft blocks
(`mtp.*`) are left out.
"""


def model_card(plan: Plan, record: Mapping[str, Any]) -> str:
    """README.md of a result, from the plan and the conversion record."""
    facts = sizes(plan)
    name = plan.checkpoint.public_name
    title = name.rpartition("/")[2]
    parts = [
        _HEAD.format(
            base=f"base_model: {name}\n" if plan.checkpoint.on_hub else "",
            title=f"{title}, {plan.recipe.name}",
            source=name,
            recipe=plan.recipe.name,
            summary=plan.recipe.summary or "a recipe of its own",
            folder=f"{title}-{plan.recipe.name}",
            size=plan.nbytes,
            gib=plan.nbytes / GIB,
            read=facts.read_per_token / 1e9,
        ),
        _provenance(record),
        _formats(record),
        _errors(record),
        _hashes(record),
    ]
    return "\n".join(part for part in parts if part)


def _provenance(record: Mapping[str, Any]) -> str:
    lines = ["## Provenance", "", f"- source revision: {record['revision'] or 'not known'}"]
    lines.append(f"- recipe: {record['recipe']}")
    if record["importance"]:
        lines.append(f"- columns weighted by {record['importance']}")
    exact = "every weight has the published value, bit for bit" if record["lossless"] else ""
    return "\n".join([*lines, *([f"- {exact}"] if exact else [])]) + "\n"


def _formats(record: Mapping[str, Any]) -> str:
    rows = [f"| {kind} | {', '.join(names)} |" for kind, names in record["formats"].items()]
    return "\n".join(["## Formats", "", "| weights | stored as |", "|---|---|", *rows]) + "\n"


def _errors(record: Mapping[str, Any]) -> str:
    rows = [
        f"| {kind} | {100 * row['error']:.3f}% | {100 * row['mlx_error']:.3f}% |"
        for kind, row in record["errors"].items()
    ]
    if not rows:
        return ""
    head = [
        "## Error",
        "",
        "Relative RMS error of the weights, and what `mx.quantize` would give.",
        "",
    ]
    return "\n".join([*head, "| weights | here | mx.quantize |", "|---|---|---|", *rows]) + "\n"


def _hashes(record: Mapping[str, Any]) -> str:
    rows = [f"{shard['sha256']}  {name}" for name, shard in record["shards"].items()]
    return "\n".join(["## sha256", "", "```", *rows, "```"]) + "\n"
