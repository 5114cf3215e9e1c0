"""`mlxsteer calibrate`: how far a vector can go."""

from __future__ import annotations

from typing import Any

import click

from mlxsteer.cli.options import (
    load_model,
    model_option,
    number_list,
    print_json,
    print_table,
    run_options,
)


@click.command("calibrate")
@click.argument("name")
@model_option
@click.option("--questions", "n_questions", type=click.IntRange(1), default=8,
              help="Held-out questions to ask.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(8), default=64,
              help="Tokens of an answer, at most.")  # fmt: skip
@click.option("--doses", metavar="D,D,…", help="Doses to try for each sign, e.g. 0.1,0.2,0.4.")
@click.option(
    "--perplexity-ratio",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    help="Coherent means: perplexity under the unsteered model at most this many times.",
)
@click.option(
    "--distinct2-ratio",
    type=click.FloatRange(0, min_open=True),
    default=0.5,
    help="… and at least this share of the unsteered answers' distinct bigrams.",
)
@click.option("--dry-run", is_flag=True, help="Print the table; change no file.")
@run_options
def command(
    name: str,
    model_name: str | None,
    doses: str | None,
    perplexity_ratio: float,
    distinct2_ratio: float,
    dry_run: bool,
    dtype: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the vector NAME's limits, one for each sign, and write them into it.

    Strength 5 then means the largest dose whose answers to held-out questions stay coherent.
    A bundled vector is copied among yours first.

    \b
    Example:
      mlxsteer calibrate terse --model demo
    """
    from mlxsteer import library
    from mlxsteer.calibrate import Guard
    from mlxsteer.calibrate import calibrate as find_limits

    guard = Guard(perplexity_ratio=perplexity_ratio, distinct2_ratio=distinct2_ratio)
    if doses is not None:
        options["doses"] = number_list(doses, float, "doses", "0.1,0.2,0.4")
    model = load_model(model_name, dtype, force)
    target = (
        None if dry_run else library.own_path(name, model.key)
    )  # a bad name fails before the work
    found = library.find_or_extract(name, model)
    vector = find_limits(model, found, guard=guard, force=force, **options)
    path = vector.save(target) if target else None
    calibration = vector.calibration
    assert calibration is not None
    if as_json:
        print_json(
            {
                "path": path,
                "delta_plus": calibration.delta_plus,
                "delta_minus": calibration.delta_minus,
                "curve": calibration.curve,
            }
        )
        return
    heads = ["dose", "metric", "words", "ended", "distinct2", "perplexity"]
    rows = [[r["amount"], *(r[head] for head in heads[1:])] for r in calibration.curve]
    print_table(heads, [["-" if value is None else value for value in row] for row in rows])
    click.echo(
        f"{vector.name}: coherent up to dose {calibration.delta_plus:g} (strength 5) and"
        f" {calibration.delta_minus:g} (strength -5)."
        + (f"\nWritten to {path}" if path else "\nDry run: nothing was written.")
    )
