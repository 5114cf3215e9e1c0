"""`mlxsteer chat`: talk to a steered model, line by line or in one shot."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlxsteer.cli.options import (
    SAMPLING_FIELDS,
    load_model,
    model_option,
    print_json,
    run_options,
    sampling_options,
    steer_option,
    take_sampling,
)
from mlxsteer.errors import MlxsteerError, UsageError

if TYPE_CHECKING:
    from mlxsteer.generation import Piece
    from mlxsteer.plan import Plan
    from mlxsteer.session import Session


@click.command("chat")
@model_option
@steer_option
@click.option(
    "--prompt", "-p", metavar="TEXT", help="Answer this and leave; - reads it from stdin."
)
@click.option("--compare", is_flag=True, help="Show the unsteered answer beside each answer.")
@click.option(
    "--meter",
    metavar="NAMES",
    help="Show how far along these vectors each token lies, e.g. terse,formal or terse@12.",
)
@click.option("--explain", is_flag=True, help="Say what is added where, on stderr.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--think/--no-think", default=False, help="Let the model think first, if it can.")
@click.option("--think-max", is_flag=True, help="Think with the greatest effort (DeepSeek-V4).")
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the chat in this file, after every turn.",
)
@click.option(
    "--load",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Go on with the chat in this file; options given here come before its own.",
)
@sampling_options
@run_options
def command(prompt: str | None, compare: bool, save: Path | None, **options: Any) -> None:
    """Talk to a model, steered. Type /help in the chat for its commands.

    With -p, or with lines on stdin, only answers go to stdout.

    \b
    Examples:
      mlxsteer chat --model demo --steer terse:3
      mlxsteer chat -s terse:3 --compare -p 'Why is the sky blue?'
      mlxsteer chat -s terse:3 --meter terse,formal
    """
    as_json = options.pop("as_json")
    if as_json and prompt is None:
        raise UsageError("--json prints one answer, so it needs a question: add -p 'TEXT'.")
    question = None if prompt is None else _question(prompt)
    session = _open_session(**options)
    if question is None:
        from mlxsteer.repl import Repl

        sys.exit(Repl(session, compare=compare, save=save).run())
    _one_shot(session, question, compare=compare, save=save, as_json=as_json)


def _question(prompt: str) -> str:
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("The question is empty. Type e.g. -p 'Why is the sky blue?'")
    return text.strip()


def _open_session(
    *,
    model_name: str | None,
    steer: tuple[str, ...],
    load: Path | None,
    system: str | None,
    think: bool,
    think_max: bool,
    meter: str | None,
    explain: bool,
    dtype: str | None,
    force: bool,
    **options: Any,
) -> Session:
    """The session of the options, or of the saved chat with what was typed put over it."""
    from mlxsteer.grammar import parse

    sampling = take_sampling(options)
    for text in steer:
        parse(text)  # a typo shows before a model is loaded
    if load is not None and model_name is None:
        model_name = _model_of_chat(load)
    model = load_model(model_name, dtype, force)
    from mlxsteer.session import Session

    session = Session(model, sampling=sampling, force=force)
    if load is not None:
        for warning in session.load(load):
            click.echo(warning, err=True)
        typed = {name: getattr(sampling, name) for name in SAMPLING_FIELDS if _was_typed(name)}
        session.sampling = replace(session.sampling, **typed)
    if system is not None:
        session.system = system
    if load is None or think_max or _was_typed("think"):
        session.think("max" if think_max else think)
    if load is None or steer:
        session.steer(list(steer))
    if meter is not None:
        session.meter(meter.split(","))
    _say_steering(session.plan, explain)
    return session


def _was_typed(option: str) -> bool:
    source = click.get_current_context().get_parameter_source(option)
    return source is ParameterSource.COMMANDLINE


def _model_of_chat(path: Path) -> str | None:
    """The model that a saved chat was held with, where its name still leads to one."""
    from mlxsteer.models.names import resolve_model
    from mlxsteer.session import read_chat

    name = str(read_chat(path)["model"])
    with suppress(MlxsteerError):
        resolve_model(name, allow_download=False)
        return name
    return None


def _say_steering(plan: Plan, explain: bool) -> None:
    if explain:
        click.echo(plan.explain(), err=True)
    if not explain or not plan:
        for warning in plan.warnings:
            click.echo(warning, err=True)


def _one_shot(
    session: Session, question: str, *, compare: bool, save: Path | None, as_json: bool
) -> None:
    from mlxsteer.repl import Repl

    try:
        if as_json:
            print_json(_facts(session, question, compare))
        else:
            Repl(session, compare=compare).answer(question)
    finally:
        if save is not None and session.messages:  # also of an answer that was stopped
            session.save(save)


def _facts(session: Session, question: str, compare: bool) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if compare:
        pieces = list(session.ask_plain(question))
        extra["unsteered"] = "".join(p.text for p in pieces if not p.thinking).strip()
        if session.probes:
            extra["unsteered_meter"] = _readings(session, pieces)
    written = list(session.ask(question))
    if session.probes:
        extra["meter"] = _readings(session, written)
    answer = session.messages[-1]
    turn = session.last
    return {
        "model": session.model.label,
        "steer": str(session.plan),
        "question": question,
        "answer": answer["content"],
        "thinking": answer.get("reasoning_content"),
        "prompt_tokens": turn.prompt_tokens,
        "answer_tokens": turn.answer_tokens,
        "finish_reason": turn.finish_reason,
        "warnings": list(session.plan.warnings),
        **extra,
    }


def _readings(session: Session, pieces: list[Piece]) -> dict[str, Any]:
    """The series of an answer: a row of readings for every token, in the order of the names."""
    from mlxsteer.meter import series_of

    series = series_of(session.probes, pieces)
    return {
        "names": series.names,
        "layers": [probe.layer for probe in session.probes],
        "means": series.means,
        "tokens": series.tokens,
        "texts": series.texts,
        "readings": series.values,
    }
