"""`mlxsteer demo`: one question answered by one model in three ways."""

from __future__ import annotations

import click

from mlxsteer.cli.options import json_option, print_json

STEERINGS = ("", "terse:3", "terse:-3")


@click.command("demo")
@click.option(
    "--prompt",
    "-p",
    metavar="TEXT",
    default="Why do databases use indexes?",
    help="The question.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=120,
              help="Tokens of an answer, at most.")  # fmt: skip
@json_option
def command(prompt: str, max_tokens: int, as_json: bool) -> None:
    """Let the demo model answer a question unsteered, terse and verbose.

    The first time it fetches the model (about 90 MB).

    \b
    Example:
      mlxsteer demo -p 'Why is the sky blue?'
    """
    from mlxsteer.generation import Sampling, generate_batch
    from mlxsteer.model import load
    from mlxsteer.progress import progress

    model = load("demo")
    plans = [model.plan(text) for text in STEERINGS]
    tokens = model.render(prompt)
    with progress("Three answers in one batch", len(plans), enabled=not as_json) as advance:
        sampling = Sampling(max_tokens=max_tokens)
        answers = generate_batch(model, [tokens] * 3, plans, sampling, on_tokens=advance)
    rows = [
        {"steer": text, "words": len(answer.text.split()), "answer": answer.text}
        | {"finish_reason": answer.finish_reason}
        for text, answer in zip(STEERINGS, answers, strict=True)
    ]
    if as_json:
        print_json({"model": model.label, "question": prompt, "answers": rows})
        return
    click.echo(f"{prompt}\n")
    for row in rows:
        cut = "" if row["finish_reason"] == "stop" else f", cut at {max_tokens} tokens"
        click.echo(f"== {row['steer'] or 'unsteered'} ({row['words']} words{cut}) ==")
        click.echo(f"{row['answer']}\n")
    click.echo("Next: mlxsteer chat --model demo --steer terse:3")
    click.echo("      mlxsteer chat --model demo --steer cheerful:3 --compare")
