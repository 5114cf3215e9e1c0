"""`mlxsteer evaluate`: whether a vector does what its name says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlxsteer.cli.facts import print_checks, print_context, print_rows
from mlxsteer.cli.options import load_model, model_option, print_json, run_options
from mlxsteer.errors import UsageError

if TYPE_CHECKING:
    from mlxsteer.contextset import ContextSet
    from mlxsteer.model import Model
    from mlxsteer.vector import SteeringVector

NOT_FOR_DOCUMENTS = ("set_name", "judge_at", "judge_model", "temp", "seed")
CONTEXT_OPTIONS = ("strength", "random", "max_tokens")


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
@click.option(
    "--context",
    "document",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="The document that the vector was made from (mlxsteer extract --from-context).",
)
@click.option(
    "--questions",
    metavar="N|FILE",
    default="24",
    help="How many held-out questions; with --context, the file of questions.",
)
@click.option(
    "--random",
    type=click.IntRange(0),
    default=20,
    help="Random directions of the same lengths that it is compared with.",
)
@click.option("--max-tokens", type=click.IntRange(8), default=100,
              help="Tokens of an answer, at most.")  # fmt: skip
@click.option("--temp", type=click.FloatRange(0), default=0.0,
              help="0 is greedy: always the likeliest token.")  # fmt: skip
@click.option("--seed", type=int, help="Makes sampling repeatable, with --temp.")
@click.option(
    "--judge",
    "judge_at",
    metavar="local|URL",
    help="Also ask a judge which answer shows more of the trait: the model itself, or an"
    " OpenAI-compatible endpoint (key in MLXSTEER_JUDGE_KEY or OPENAI_API_KEY).",
)
@click.option("--judge-model", metavar="NAME", help="The endpoint's model.")
@click.option("--dry-run", is_flag=True, help="Print the verdict; change no file.")
@run_options
@click.pass_context
def command(
    ctx: click.Context,
    name: str,
    model_name: str | None,
    set_name: str | None,
    document: str | None,
    questions: str,
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

    A vector made from a document is measured against the document in the prompt: how much of
    its effect on the next token, and of the answers that it gave, is recovered.

    \b
    Examples:
      mlxsteer evaluate terse --model demo
      mlxsteer evaluate rules --context rules.txt --questions questions.yaml
    """
    from mlxsteer import library
    from mlxsteer.contrast import ContrastSet
    from mlxsteer.evaluate import evaluate, with_evaluation
    from mlxsteer.judgebackends import open_judge

    context = _context(ctx, document, questions)
    count = None if context else _count(questions)
    contrast = ContrastSet.load(set_name) if set_name else None
    if judge_model and not judge_at:
        raise UsageError("--judge-model goes with --judge URL. Give both.")
    model = load_model(model_name, dtype, force)
    judge = open_judge(judge_at, judge_model, model) if judge_at else None
    target = None if dry_run else library.own_path(name, model.key)
    vector = library.find_or_extract(name, model)
    if context is not None:
        chosen = {"force": force} | {key: options[key] for key in CONTEXT_OPTIONS}
        _evaluate_context(model, name, vector, context, target, as_json, chosen)
        return
    _require_no_document(name, vector)
    options |= {"questions": count, "force": force}
    found = evaluate(model, vector, contrast=contrast, judge=judge, **options)
    path = with_evaluation(vector, found).save(target) if target else None
    if as_json:
        print_json({"name": name, "path": path, **found.to_dict()})
        return
    click.echo(f"{name}: {found.sentence} (judged at strength {found.measured.strength:g}).\n")
    print_checks(found.checks)
    click.echo(f"\nMetric: {found.metric}; more of the name is {found.direction}.")
    print_rows(found.rows)
    click.echo(_written(path))


def _context(ctx: click.Context, document: str | None, questions: str) -> ContextSet | None:
    """The document and its questions, where they were given; refuses what does not go with it."""
    from mlxsteer.contextset import ContextSet

    if document is None:
        return None
    if ctx.get_parameter_source("questions") == ParameterSource.DEFAULT:
        raise UsageError("--context FILE goes with --questions FILE. Give both.")
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(str(parameter.name)) != ParameterSource.DEFAULT
        if parameter.name in NOT_FOR_DOCUMENTS and given:
            raise UsageError(f"{parameter.opts[0]} does not go with --context. Leave it out.")
    return ContextSet.load(document, questions)


def _count(questions: str) -> int:
    if not questions.isdecimal():
        raise UsageError(
            f"--questions is a number here, not {questions!r}. A file of questions goes with"
            " --context FILE."
        )
    return int(questions)


def _require_no_document(name: str, vector: SteeringVector) -> None:
    if vector.about.get("kind") == "context":
        raise UsageError(
            f"{name} was made from a document, which it does not hold. Give it again: mlxsteer"
            f" evaluate {name} --context FILE --questions FILE"
        )


def _evaluate_context(
    model: Model,
    name: str,
    vector: SteeringVector,
    context: ContextSet,
    target: Path | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from mlxsteer.context_evaluation import evaluate_context, with_evaluation

    found = evaluate_context(model, vector, context, **options)
    path = with_evaluation(vector, found).save(target) if target else None
    if as_json:
        print_json({"path": path, **found.to_dict(), "name": name})
        return
    click.echo(f"{name}: {found.sentence}.\n")
    print_context(found.to_dict())
    click.echo(_written(path))


def _written(path: Path | None) -> str:
    return f"Written to {path}" if path else "Dry run: nothing was written."
