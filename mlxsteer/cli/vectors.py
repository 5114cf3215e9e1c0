"""`mlxsteer vectors`: the group, and its commands that list, show and combine.

Parses and prints; files are `formats`' and `vectorfile`'s work, names `library`'s.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsteer.cli import analysis, exchange, explain
from mlxsteer.cli.facts import show
from mlxsteer.cli.options import json_option, model_option, print_json, print_table
from mlxsteer.cli.stored import force_option, key_of, open_vector, refuse_to_replace, sentence
from mlxsteer.errors import MlxsteerError, UsageError
from mlxsteer.grammar import Term, parse
from mlxsteer.progress import say

if TYPE_CHECKING:
    from mlxsteer.vector import SteeringVector

_SUMMAND = re.compile(
    r"\s*(?P<sign>[+-]?)\s*(?:(?P<before>\d*\.?\d+(?:[eE][+-]?\d+)?)\s*\*\s*)?"
    r'(?P<name>"[^"]+"|[^\s"*]+?)(?:\s*\*\s*(?P<after>\d*\.?\d+(?:[eE][+-]?\d+)?))?'
    r"(?=\s+[+-]\s|\s*\Z)"
)


@click.group(name="vectors")
def command() -> None:
    """Look at, compare, exchange and combine steering vectors.

    \b
    Example:
      mlxsteer vectors list --model demo
    """


for _command in (
    analysis.compare_command,
    analysis.lens_command,
    explain.explain_command,
    exchange.import_command,
    exchange.export_command,
    exchange.push_command,
    exchange.pull_command,
):
    command.add_command(_command)


@command.command("list")
@model_option
@json_option
def list_command(model_name: str | None, as_json: bool) -> None:
    """List the vectors for a model: yours and the bundled ones.

    \b
    Example:
      mlxsteer vectors list --model demo --json
    """
    from mlxsteer import library
    from mlxsteer.vector import SteeringVector

    key = key_of(model_name)
    rows = []
    for name, path in library.available(key).items():
        try:
            row = _facts(SteeringVector.load(path))
        except MlxsteerError as error:
            say(f"{name}: {error}")
            continue
        yours = library.user_dir(key) in path.parents
        rows.append(row | {"name": name, "from": "you" if yours else "bundled"})
    if as_json:
        print_json({"model": key, "vectors": rows})
    elif rows:
        print_table(["name", "op", "site", "layers", "limit +", "limit -", "from"], _cells(rows))
    else:
        make = f"mlxsteer extract terse --model {model_name or key}"
        say(f"No vectors for {key} yet. Make one: {make}")


@command.command("show")
@click.argument("vector")
@model_option
@json_option
def show_command(vector: str, model_name: str | None, as_json: bool) -> None:
    """Show what a vector (a name or a file) does and where it is from.

    \b
    Example:
      mlxsteer vectors show terse --model demo
    """
    facts = _facts(open_vector(vector, key_of(model_name)))
    if as_json:
        print_json(facts)
        return
    show(facts)


@command.command("combine")
@click.argument("terms")
@click.argument("out")
@model_option
@force_option
def combine_command(terms: str, out: str, model_name: str | None, force: bool) -> None:
    """Add vectors into one, at OUT: a .safetensors file, or a name among your vectors.

    TERMS is a sum ("2*terse - formal") or steering text ("terse:2, formal:-1").

    \b
    Example:
      mlxsteer vectors combine "2*terse - formal" brisk --model demo
    """
    from mlxsteer import library
    from mlxsteer.combination import combine

    key = key_of(model_name)
    parts = [term.amount * open_vector(term.name, key) for term in _strengths(terms)]
    named = not out.endswith(library.SUFFIX)
    target = library.user_dir(key) / f"{out}{library.SUFFIX}" if named else Path(out)
    refuse_to_replace(target, force)
    mixed = replace(combine(parts), name=target.stem)
    click.echo(f"{library.save(mixed, key) if named else mixed.save(target)}")
    say(f"{sentence(mixed)} Its limit is not known yet: mlxsteer calibrate {out}")


# --- what is typed ------------------------------------------------------------------------------


def _strengths(text: str) -> list[Term]:
    """The terms of `2*terse - formal` or `terse:2, formal:-1`, strengths only."""
    terms = _sum(text) or parse(text)
    if not terms:
        raise UsageError('There is nothing to combine. Type e.g. "2*terse - formal".')
    for term in terms:
        if term.unit or term.positions:
            raise UsageError(
                f"{term.name!r}: a combination takes strengths alone, no unit and no @positions."
                f" Type {term.name}:{term.amount:g}"
            )
    return terms


def _sum(text: str) -> list[Term]:
    """The terms of a sum with `*`, ` + ` or ` - `; none when `text` is not of that form."""
    if not re.search(r"\*|\s[+-]\s|^\s*[+-]\s*\w", text):
        return []
    terms: list[Term] = []
    at = 0
    while at < len(text.rstrip()):
        match = _SUMMAND.match(text, at)
        if not match or (terms and not match["sign"]):
            raise UsageError(
                f"The sum is unclear at character {at + 1}: {text[at:].strip()!r}. Type e.g."
                ' "2*terse - formal", with blanks around + and -.'
            )
        amount = float(match["before"] or 1) * float(match["after"] or 1)
        terms.append(Term(match["name"].strip('"'), -amount if match["sign"] == "-" else amount))
        at = match.end()
    return terms


# --- what is printed ----------------------------------------------------------------------------


def _facts(vector: SteeringVector) -> dict[str, Any]:
    calibration = vector.calibration
    return {
        "name": vector.name,
        "op": vector.op,
        "site": vector.site,
        "layers": list(vector.layers),
        "n_layers": vector.n_layers,
        "d_model": vector.d_model,
        "positions": vector.positions,
        "gain": vector.gain,
        "effect": vector.effect if vector.op == "project" else None,
        "delta_plus": calibration.delta_plus if calibration else None,
        "delta_minus": calibration.delta_minus if calibration else None,
        **{key: value for key, value in vector.model.items() if value is not None},
        **{key: value for key, value in vector.about.items() if value is not None},
    }


def _cells(rows: list[dict[str, Any]]) -> list[list[Any]]:
    cells = []
    for row in rows:
        layers = f"{row['layers'][0]}-{row['layers'][-1]} of {row['n_layers']}"
        limits = [row[which] or "-" for which in ("delta_plus", "delta_minus")]
        cells.append([row["name"], row["op"], row["site"], layers, *limits, row["from"]])
    return cells
