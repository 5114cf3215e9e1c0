"""`mlxsteer sweep`: a vector over doses, layers, sites, ops, methods or positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsteer.cli.options import (
    load_model,
    model_option,
    number_list,
    print_json,
    print_table,
    run_options,
)
from mlxsteer.errors import UsageError

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.sweep import Sweep

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("sweep")
@click.argument("name")
@model_option
@click.option(
    "--over",
    type=click.Choice(["strength", "layers", "sites", "ops", "methods", "positions"]),
    default="strength",
    help="What varies beside the dose. All but strength extract the vector anew.",
)
@click.option(
    "--amounts",
    metavar="A,A,…",
    help="In place of the usual ones: strengths (--over strength) or doses (otherwise).",
)
@click.option("--width", type=click.IntRange(1), help="Layers of a band, with --over layers.")
@click.option(
    "--set",
    "set_name",
    metavar="SET",
    help="Contrast set (name or .yaml). Default: the vector's own.",
)
@click.option("--questions", type=click.IntRange(1), default=12,
              help="Held-out questions to ask.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1), default=80,
              help="Tokens of an answer, at most.")  # fmt: skip
@click.option("--temp", type=click.FloatRange(0), default=0.0,
              help="0 is greedy: always the likeliest token.")  # fmt: skip
@click.option("--seed", type=int, help="Makes sampling repeatable, with --temp.")
@click.option(
    "--random",
    type=click.IntRange(0),
    default=4,
    help="Random directions to compare with, over strength.",
)
@click.option("--out", type=FILE, help="Answers as JSON lines; an interrupted sweep goes on there.")
@click.option("--html", type=FILE, help="A report to open in a browser (needs mlxsteer[plot]).")
@click.option("--png", type=FILE, help="The figure alone (needs mlxsteer[plot]).")
@click.option("--write", is_flag=True, help="Make the best setting the vector's, and calibrate it.")
@run_options
def command(
    name: str,
    model_name: str | None,
    set_name: str | None,
    amounts: str | None,
    out: Path | None,
    html: Path | None,
    png: Path | None,
    write: bool,
    dtype: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask held-out questions under the vector NAME at doses of both signs.

    \b
    Examples:
      mlxsteer sweep terse --model demo --html report.html
      mlxsteer sweep terse --over layers --width 4 --png layers.png
    """
    from mlxsteer import figures, library, report
    from mlxsteer.answers import AnswerStore, model_store
    from mlxsteer.contrast import ContrastSet
    from mlxsteer.sweep import sweep

    if html or png:
        figures.require()
    if write and options["over"] == "strength":
        raise UsageError(
            "--write keeps the best layers, site, op, method or position; choose one with --over."
            " For the largest coherent strength: mlxsteer calibrate"
        )
    contrast = ContrastSet.load(set_name) if set_name else None
    model = load_model(model_name, dtype, force)
    target = library.own_path(name, model.key) if write else None
    vector = library.find_or_extract(name, model)
    store = AnswerStore(out) if out else model_store(model)
    options["amounts"] = (
        number_list(amounts, float, "amounts", "-3,1,3") if amounts is not None else ()
    )
    found = sweep(model, vector, contrast=contrast, store=store, force=force, **options)
    if html:
        report.save_html(found, html)
    if png:
        figures.save_png(found, png)
    path = _write(model, found, target) if target else None
    if as_json:
        print_json({**found.to_dict(), "path": path})
        return
    _print(found)
    for written in (out, html, png, path):
        if written:
            click.echo(f"Written to {written}")


def _write(model: Model, found: Sweep, target: Path) -> Path:
    """The vector of the best cell, calibrated, in place of the old one."""
    if found.best is None:
        raise UsageError(
            "No coherent setting has an effect that chance could not give, so nothing was"
            " written. Try other --amounts, or another set."
        )
    best = model.calibrate(found.vectors[found.best.variant])
    about = {**best.about, "chosen_by": f"sweep over {found.over}: {found.best.variant}"}
    return replace(best, about=about).save(target)


def _print(found: Sweep) -> None:
    heads = ["metric", "words", "ended", "distinct2", "perplexity"]

    def figures_of(row: dict[str, float | None]) -> list[Any]:
        return ["-" if row[head] is None else row[head] for head in heads]

    rows: list[list[Any]] = [["unsteered", "", *figures_of(found.plain.row()), "-", "yes"]]
    for cell in found.cells:
        numbers = figures_of(cell.arm.row())
        amount = f"{cell.amount:+g}{cell.unit}"
        coherent = "yes" if cell.coherent else "NO"
        rows.append([cell.variant, amount, *numbers, str(cell.effect), coherent])
    if found.asking:
        rows.append(["asked in words", "", *figures_of(found.asking.row()), "-", "yes"])
    print_table(["setting", "amount", *heads, "effect (95%)", "coherent"], rows)
    more = "more" if found.direction == "up" else "less"
    click.echo(f"\nMetric: {found.metric}; more of the name is {more} of it.")
    if found.best:
        best = found.best
        click.echo(f"Largest coherent effect: {best.variant} at {best.amount:+g}{best.unit}.")
    else:
        click.echo("No coherent setting has an effect that chance could not give.")
