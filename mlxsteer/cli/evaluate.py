"""`mlxsteer evaluate`: whether a vector does what its name says."""

from __future__ import annotations

from typing import Any

import click

from mlxsteer.cli.facts import print_checks, print_rows
from mlxsteer.cli.options import (
    dtype_option,
    force_option,
    json_option,
    load_model,
    model_option,
    print_json,
)


@click.command("evaluate")
@click.argument("name")
@model_option
@click.option(
    "--set",
    "set_name",
    metavar="SET",
    help="Contrast set (name or .yaml) whose metric, held-out questions and instruction are used."
    " Default: the one that the vector came from.",
)
@click.option(
    "--strength",
    type=float,
    help="Judge at this strength. Default: 3, or 5 where 3 does too little.",
)
@click.option("--questions", type=click.IntRange(2), default=24, show_default=True)
@click.option(
    "--random",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="Random directions of the same lengths that it is compared with.",
)
@click.option("--max-tokens", type=click.IntRange(8), default=100, show_default=True)
@click.option("--temp", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--seed", type=int, help="Repeatable sampling, with --temp.")
@click.option(
    "--judge",
    "judge_at",
    metavar="local|URL",
    help="Also ask a judge which answer shows more of the trait: the model itself, or an"
    " OpenAI-compatible endpoint (key in MLXSTEER_JUDGE_KEY or OPENAI_API_KEY).",
)
@click.option("--judge-model", metavar="NAME", help="The endpoint's model.")
@click.option("--dry-run", is_flag=True, help="Print the verdict; change no file.")
@dtype_option
@force_option
@json_option
def command(
    name: str,
    model_name: str | None,
    set_name: str | None,
    judge_at: str | None,
    judge_model: str | None,
    dry_run: bool,
    dtype: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure whether the vector NAME does what its name says, at what cost, and whether it is
    better than asking for it in the prompt. The verdict is written into the vector.

    Every figure is paired with the unsteered answers to the same held-out questions. Answers
    are kept: a second run, or one after Ctrl-C, writes only those that are missing.

    \b
    Example:
      mlxsteer evaluate terse --model demo
    """
    from mlxsteer import library
    from mlxsteer.contrast import ContrastSet
    from mlxsteer.evaluate import evaluate, with_evaluation
    from mlxsteer.judgebackends import open_judge

    contrast = ContrastSet.load(set_name) if set_name else None
    model = load_model(model_name, dtype, force)
    judge = open_judge(judge_at, judge_model, model) if judge_at else None
    target = None if dry_run else library.own_path(name, model.key)
    vector = library.find_or_extract(name, model)
    found = evaluate(model, vector, contrast=contrast, judge=judge, **options)
    path = with_evaluation(vector, found).save(target) if target else None
    if as_json:
        print_json({"name": name, "path": path, **found.to_dict()})
        return
    click.echo(f"{name}: {found.sentence} (judged at strength {found.measured.strength:g}).\n")
    print_checks(found.checks)
    click.echo(f"\nMetric: {found.metric}; more of the name is {found.direction}.")
    print_rows(found.rows)
    click.echo(f"Written to {path}" if path else "Dry run: nothing was written.")
