"""How the facts of a vector are printed: a list of them, then its tables. Printing only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from mlxsteer.cli.options import print_table
from mlxsteer.verdict import Check, from_dict

TABLES = ("layer_reports", "eval")


def show(facts: Mapping[str, Any]) -> None:
    """One line a fact; the layers' figures and the evaluation below, where there are any."""
    width = max(map(len, facts)) + 2
    for what, value in facts.items():
        if value in (None, "", {}, []) or what in TABLES:
            continue
        if what == "layers":
            value = _span(value)
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        click.echo(f"{what:<{width}}{shown}")
    _layer_reports(facts.get("layer_reports") or [])
    _evaluation(facts.get("eval") or {})


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
_DOSE_KEYS = ("metric", "words", "ended", "distinct2", "perplexity")


def _evaluation(found: Mapping[str, Any]) -> None:
    if not found:
        return
    if found.get("kind") == "context":
        click.echo(f"\nEvaluated: {found['sentence']}.\n")
        print_context(found)
        return
    at = f"judged at strength {found['strength']:g}, {found['n_questions']} held-out questions"
    click.echo(f"\nEvaluated: {found['sentence']} ({at}).\n")
    print_checks(from_dict(found))
    click.echo(f"\nMetric: {found['metric']}; more of the name is {found['direction']}.")
    print_rows(found["rows"])


def print_checks(checks: Sequence[Check]) -> None:
    """One line per criterion of a verdict."""
    print_table(
        ["", "criterion", "found", "needed"],
        [[_mark(check), check.name, check.found, check.needed] for check in checks],
    )


def print_context(found: Mapping[str, Any]) -> None:
    """The evaluation of a document's vector: its checks, its strengths and what it costs."""
    print_checks(from_dict(found))
    click.echo(
        f"\nJudged at strength {found['strength']:g}, on {found['n_questions']} held-out questions"
        f" ({found['n_answerable']} with a known answer)."
    )
    rows = []
    for row in found["rows"]:
        mean, low, high = row["share"]
        right = "-" if row["right"] is None else row["right"]
        rows.append([row["amount"], row["kl"], f"{mean:z.0%}", f"[{low:z.0%}, {high:z.0%}]", right])
    print_table(["strength", "KL per token", "recovered", "95%", "right"], rows)
    click.echo(
        f"On the questions it was made from it recovers {found['training']['mean']:z.0%}."
        f"\n{found['cost']}"
    )


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A dose table: each steering's answers in figures."""
    table = [[row["amount"], *(_figure(row[key]) for key in _DOSE_KEYS)] for row in rows]
    print_table(["strength", *_DOSE_KEYS], table)


def _mark(check: Check) -> str:
    if check.passed is None:
        return "not judged"
    return "pass" if check.passed else "FAIL" if check.essential else "no"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
