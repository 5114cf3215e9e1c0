"""What `mlxsteer convert` prints: the recipe table, a plan's arithmetic, a result's errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from mlxsteer.convert.plan import Plan, make_plan
from mlxsteer.convert.real_model import REPO, real_checkpoint
from mlxsteer.convert.recipes import RECIPES
from mlxsteer.convert.sizes import GIB, Sizes, sizes
from mlxsteer.convert.space import DiskNeed, arithmetic, gigabytes


@cache
def recipe_sizes() -> dict[str, Sizes]:
    """Exact sizes of every built-in recipe for the published model, from its inventory."""
    checkpoint = real_checkpoint()
    return {name: sizes(make_plan(checkpoint, recipe)) for name, recipe in RECIPES.items()}


def list_text() -> str:
    """The table of `--list`."""
    rows = [
        (
            name,
            f"{facts.bytes_out:,}",
            f"{facts.bytes_out / GIB:.1f}",
            mac_text(facts),
            f"{facts.read_per_token / 1e9:.2f}",
            RECIPES[name].summary,
        )
        for name, facts in recipe_sizes().items()
    ]
    head = ("recipe", "bytes", "GiB", "Mac", "GB/token", "what it does")
    lines = [f"Recipes for {REPO} (draft blocks left out):", "", *columns([head, *rows]), ""]
    lines += [
        "GB/token is what one decoded token reads of the weights: bandwidth / that = tokens/s at",
        "best. * needs a higher GPU limit: sudo sysctl iogpu.wired_limit_mb=<MB>.",
        "",
        "Your own recipe: --recipe FILE.yaml; the first rule that matches decides:",
        "  rules:",
        '    - {match: "*.switch_mlp.*", layers: [0-2, -1], bits: 3, group_size: 64}',
        '    - {match: "*.switch_mlp.*", bits: 2, group_size: 64}',
    ]
    return "\n".join(lines)


def list_json() -> list[dict[str, Any]]:
    """`--list --json`."""
    return [
        {"recipe": name, "summary": RECIPES[name].summary, **asdict(facts)}
        for name, facts in recipe_sizes().items()
    ]


def mac_text(facts: Sizes) -> str:
    """`192 GB*`: the smallest Mac, starred where its GPU limit must be raised."""
    if facts.mac_gib is None:
        return "> 512 GB"
    return f"{facts.mac_gib} GB{'*' if facts.raise_limit else ''}"


def plan_text(plan: Plan, need: DiskNeed, free: int, out: str) -> str:
    """What a conversion would do, in numbers."""
    facts = sizes(plan)
    kinds = [
        (kind, f"{nbytes:,}", gigabytes(nbytes)) for kind, nbytes in facts.by_kind.items() if nbytes
    ]
    lines = [
        f"{plan.checkpoint.name} -> {out}, recipe {plan.recipe.name}",
        "",
        f"in:  {facts.tensors_in:,} tensors, {facts.bytes_in:,} bytes"
        f" (of which draft blocks, left out: {facts.dropped_bytes:,})",
        f"out: {facts.tensors_out:,} tensors, {facts.bytes_out:,} bytes"
        f" ({facts.bytes_out / GIB:.2f} GiB) in {len(plan.shards)} files",
        "",
        *columns(kinds),
        "",
        f"read per decoded token: {facts.read_per_token:,} bytes"
        f" ({facts.read_of_experts:,} of them routed experts)",
        f"smallest Mac: {mac_text(facts)}",
        f"disk: {arithmetic(need)}; {gigabytes(free)} free"
        + ("" if need.total <= free else ": NOT ENOUGH"),
    ]
    return "\n".join(lines)


def plan_json(plan: Plan, need: DiskNeed, free: int, out: str) -> dict[str, Any]:
    """`--dry-run --json`."""
    return {
        "source": plan.checkpoint.name,
        "revision": plan.checkpoint.revision,
        "recipe": plan.recipe.name,
        "out": out,
        **asdict(sizes(plan)),
        "files": len(plan.shards),
        "disk_needed": need.total,
        "disk_free": free,
    }


def error_lines(errors: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Relative RMS error per kind of weight, beside `mx.quantize`'s."""
    rows = [
        (kind, f"{100 * row['error']:.3f}%", f"{100 * row['mlx_error']:.3f}%")
        for kind, row in errors.items()
    ]
    return columns([("weights", "error", "mx.quantize"), *rows]) if rows else []


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned text; the last column is not padded."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=False)] for row in rows]
    return ["  ".join([*cells, row[-1]]) for cells, row in zip(padded, rows, strict=True)]
