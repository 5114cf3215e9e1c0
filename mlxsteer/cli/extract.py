"""`mlxsteer extract`: a vector from a contrast set, or from a document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsteer.cli.options import (
    layer_list,
    load_model,
    model_option,
    print_json,
    print_table,
    run_options,
)
from mlxsteer.errors import UsageError

if TYPE_CHECKING:
    from mlxsteer.contextset import ContextSet
    from mlxsteer.contrast import ContrastSet
    from mlxsteer.model import Model
    from mlxsteer.vector import SteeringVector


@click.command("extract")
@click.argument("contrast_set", metavar="[SET]", required=False)
@model_option
@click.option(
    "--from-context",
    "document",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="In place of SET: a document (text). The vector is what it does to the answers.",
)
@click.option(
    "--questions",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="With --from-context: questions about it, one a line, or a YAML list.",
)
@click.option("--pairs", type=click.IntRange(1), default=100,
              help="Pairs to read, at most what the set holds.")  # fmt: skip
@click.option(
    "--method",
    type=click.Choice(["mean", "pca", "logistic", "whitened"]),
    default="mean",
    help="mean: difference of means. pca: first component of the differences. logistic: weights"
    " of a probe. whitened: mean difference over the within-class covariance.",
)
@click.option(
    "--position",
    type=click.Choice(["last_prompt", "answer_mean", "text_mean", "both"]),
    help="Where states are read. `both` reads the last prompt token and the answers in one pass"
    " and keeps NAME and NAME-answer. Default: as the set says.",
)
@click.option(
    "--layers", metavar="SPANS", help="0-based, e.g. 9-20 or 3,7. Default: the set's band."
)
@click.option("--site", type=click.Choice(["residual", "ffn_out", "attn_out"]), default="residual",
              help="Where states are read and steered.")  # fmt: skip
@click.option("--op", type=click.Choice(["add", "project", "clamp"]), default="add",
              help="What steering does with the direction: shift along it, remove the part along"
              " it, or set that part to a value.")  # fmt: skip
@click.option("--orthogonalise", is_flag=True, help="Remove the part along the negatives' mean.")
@click.option(
    "--norm-preserving/--no-norm-preserving",
    default=None,
    help="Turn states instead of lengthening them. Default: as the set says.",
)
@click.option("--seed", type=int, default=0, help="Which pairs, in which order.")
@click.option("--name", help="Name of the vector. Default: the set's.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    help="File to write, instead of keeping it among your vectors.",
)
@click.option("--calibrate", is_flag=True, help="Find its limits afterwards, too.")
@run_options
def command(
    contrast_set: str | None,
    document: str | None,
    questions: str | None,
    model_name: str | None,
    layers: str | None,
    out: str | None,
    calibrate: bool,
    dtype: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a vector from the contrast set SET (a name, or a .yaml file), or from a document
    and questions about it.

    Interrupted, the same command goes on where it stopped.

    \b
    Examples:
      mlxsteer extract terse --model demo
      mlxsteer extract --from-context rules.txt --questions questions.yaml
    """
    from mlxsteer import library

    source = _source(contrast_set, document, questions)
    options["layers"] = layer_list(layers)
    if out is None:
        library.check_name(options["name"] or source.name)
    model = load_model(model_name, dtype, force)
    found = _extracted(model, source, options)
    facts = []
    for position in sorted(found, key="answer_mean".__eq__):  # last_prompt keeps the plain name
        vector = found[position]
        suffix = "-answer" if position == "answer_mean" and len(found) > 1 else ""
        vector = replace(vector, name=vector.name + suffix)
        if calibrate:
            vector = _calibrated(model, source, vector)
        path = _keep(vector, model.key, out, suffix)
        facts.append({"path": path, "name": vector.name, **vector.about})
        if not as_json:
            _report(vector, path)
            click.echo(_next_step(vector, document, questions))
    if as_json:
        print_json(facts if len(facts) > 1 else facts[0])


def _source(
    contrast_set: str | None, document: str | None, questions: str | None
) -> ContrastSet | ContextSet:
    from mlxsteer.contextset import ContextSet
    from mlxsteer.contrast import ContrastSet

    if (contrast_set is None) == (document is None):
        raise UsageError(
            "Give a contrast set (mlxsteer extract terse) or a document (--from-context FILE"
            " --questions FILE), one of the two."
        )
    if (document is None) != (questions is None):
        raise UsageError("--from-context FILE and --questions FILE go together. Give both.")
    if document is not None and questions is not None:
        return ContextSet.load(document, questions)
    return ContrastSet.load(str(contrast_set))


def _extracted(
    model: Model, source: ContrastSet | ContextSet, options: dict[str, Any]
) -> dict[str, SteeringVector]:
    from mlxsteer.context_extract import extract_context
    from mlxsteer.contextset import ContextSet
    from mlxsteer.extract import extract_positions

    if isinstance(source, ContextSet):
        return extract_context(model, source, **options)
    return extract_positions(model, source, **options)


def _calibrated(
    model: Model, source: ContrastSet | ContextSet, vector: SteeringVector
) -> SteeringVector:
    """With its limits; a document's are found on the questions that it was made from."""
    from mlxsteer import calibrate
    from mlxsteer.contextset import ContextSet

    questions = None
    if isinstance(source, ContextSet):
        asked = source.training[: calibrate.QUESTIONS]
        questions = [source.questions[index].text for index in asked]
    return calibrate.calibrate(model, vector, questions=questions)


def _keep(vector: SteeringVector, key: str, out: str | None, suffix: str) -> Path:
    from mlxsteer import library

    if out is None:
        return library.save(vector, key)
    target = Path(out)
    return vector.save(target.with_name(target.stem + suffix + target.suffix))


def _report(vector: SteeringVector, path: Path) -> None:
    about = vector.about
    rows = [
        [r["layer"], *(_figure(r[key]) for key in ("norm_ratio", "auroc", "agreement"))]
        for r in about["layer_reports"]
    ]
    print_table(["layer", "norm ratio", "held-out AUROC", "pair agreement"], rows)
    saved = 1 - about["tokens_run"] / about["tokens_given"]
    click.echo(
        f"{vector.name}: {about['n_pairs']} pairs read at {about['extract_position']},"
        f" {about['tokens_run']:,} tokens run ({saved:.0%} saved by shared prefixes).\n"
        f"Kept in {path}\n"
        "These figures say that the poles differ, not that the vector steers. To see that:"
    )


def _next_step(vector: SteeringVector, document: str | None, questions: str | None) -> str:
    if document is None:
        return f"  mlxsteer chat --steer {vector.name}:3 --compare -p 'Why is the sky blue?'"
    return f"  mlxsteer evaluate {vector.name} --context {document} --questions {questions}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
