"""How the facts of a vector are printed: a list of them, then its tables. Printing only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from mlxsteer.cli.options import print_table

TABLES = ("layer_reports", "dose_table")


def show(facts: Mapping[str, Any]) -> None:
    """One line a fact; the layers' figures and the dose table below, where there are any."""
    width = max(map(len, facts)) + 2
    for what, value in facts.items():
        if value in (None, "", {}, []) or what in TABLES:
            continue
        if what == "layers":
            value = _span(value)
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        click.echo(f"{what:<{width}}{shown}")
    _layer_reports(facts.get("layer_reports") or [])
    _dose_table(facts.get("dose_table") or {})


def _span(layers: Sequence[int]) -> Any:
    """`9-20` for neighbouring layers, else the list."""
    together = len(layers) == layers[-1] - layers[0] + 1
    return f"{layers[0]}-{layers[-1]}" if together else list(layers)


def _layer_reports(reports: Sequence[Mapping[str, Any]]) -> None:
    if not reports:
        return
    click.echo("\nHow far apart the poles are (no proof that it steers):")
    rows = [[r["layer"], *(_figure(r[key]) for key in _LAYER_KEYS)] for r in reports]
    print_table(["layer", "norm ratio", "held-out AUROC", "pair agreement"], rows)


_LAYER_KEYS = ("norm_ratio", "auroc", "agreement")
_DOSE_KEYS = ("amount", "metric", "words", "ended", "distinct2", "perplexity")


def _dose_table(table: Mapping[str, Any]) -> None:
    if not table:
        return
    click.echo(
        f"\nWhat it did: {table['questions']} held-out questions, {table['decoding']}, at most"
        f" {table['max_tokens']} tokens; the metric is {table['metric']}."
    )
    rows = [[_figure(row[key]) for key in _DOSE_KEYS] for row in table["rows"]]
    print_table(["strength", *_DOSE_KEYS[1:]], rows)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
