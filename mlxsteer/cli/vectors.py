"""`mlxsteer vectors`: list, show, import, export, combine, push and pull steering vectors.

Parses and prints; files are `formats`' and `vectorfile`'s work, names `library`'s.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsteer.cli.facts import show
from mlxsteer.cli.options import json_option, layer_list, model_option, print_json, print_table
from mlxsteer.errors import MlxsteerError, UsageError, VectorError
from mlxsteer.grammar import Term, parse
from mlxsteer.progress import say

if TYPE_CHECKING:
    from mlxsteer.vector import SteeringVector

FOREIGN = (".gguf", ".f32")
_SUMMAND = re.compile(
    r"\s*(?P<sign>[+-]?)\s*(?:(?P<before>\d*\.?\d+(?:[eE][+-]?\d+)?)\s*\*\s*)?"
    r'(?P<name>"[^"]+"|[^\s"*]+?)(?:\s*\*\s*(?P<after>\d*\.?\d+(?:[eE][+-]?\d+)?))?'
    r"(?=\s+[+-]\s|\s*\Z)"
)

name_option = click.option("--name", metavar="NAME", help="What to call the vector.")
force_option = click.option("--force", is_flag=True, help="Replace a file that is there already.")


@click.group(name="vectors")
def command() -> None:
    """Look at, exchange and combine steering vectors.

    \b
    Example:
      mlxsteer vectors list --model demo
    """


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

    key = _key(model_name)
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
    facts = _facts(_open(vector, _key(model_name)))
    if as_json:
        print_json(facts)
        return
    show(facts)


@command.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@name_option
@model_option
@click.option(
    "--gguf-base",
    default="exact",
    show_default=True,
    metavar="BASE",
    help="What direction.N counts: exact (llama.cpp, repeng), or generator (cvector-generator).",
)
@click.option("--op", metavar="OP", help="For bare arrays: add, project or clamp.")
@click.option("--site", metavar="SITE", help="For bare arrays: residual, ffn_out or attn_out.")
@click.option("--layers", metavar="SPANS", help="0-based layers to take, such as 10-19,22.")
@click.option("--n-layers", type=int, metavar="N", help="The model's depth, if the file lacks it.")
@force_option
def import_command(
    file: Path,
    name: str | None,
    model_name: str | None,
    layers: str | None,
    force: bool,
    **told: Any,
) -> None:
    """Take a llama.cpp, repeng, GLP, ds4 or array file in among your vectors.

    \b
    Example:
      mlxsteer vectors import verbosity.f32 --name terse-ds4 --model v4-flash
    """
    from mlxsteer import library
    from mlxsteer.formats import import_file

    key = _key(model_name)
    vector = import_file(file, name=name, layers=layer_list(layers), warn=say, **told)
    _check_width(vector, model_name, file)
    target = library.user_dir(key) / f"{vector.name}{library.SUFFIX}"
    _refuse_to_replace(target, force)
    path = library.save(vector, key)
    click.echo(f"{path}")
    unit = "r" if vector.op == "add" and vector.residual_norm is None else ""
    how = f"--model {model_name or key} --steer {vector.name}:1{unit}"
    say(f"{_sentence(vector)} Try: mlxsteer chat {how}")


@command.command("export")
@click.argument("vector")
@click.argument("out", type=click.Path(path_type=Path))
@model_option
@click.option("--format", "format_", metavar="FORMAT", help="gguf, glp, ds4 or safetensors.")
@click.option(
    "--gguf-base",
    default="exact",
    show_default=True,
    metavar="BASE",
    help="exact: N as llama.cpp applies it; generator: as its cvector-generator writes it.",
)
@click.option("--strength", type=float, metavar="S", help="What scale 1 of the file means.")
@click.option(
    "--drop-layer-0", is_flag=True, help="Leave layer 0 out where a format cannot say it."
)
@force_option
def export_command(
    vector: str, out: Path, model_name: str | None, format_: str | None, force: bool, **told: Any
) -> None:
    """Write a vector for llama.cpp (gguf), GLP readers or ds4.

    \b
    Example:
      mlxsteer vectors export terse terse.gguf --strength 3
    """
    from mlxsteer.formats import export_file

    opened = _open(vector, _key(model_name))
    _refuse_to_replace(out, force)
    if out.suffix == ".f32":
        _refuse_to_replace(out.with_suffix(".json"), force)
    for path in export_file(opened, out, format_, warn=say, **told):
        click.echo(f"{path}")


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

    key = _key(model_name)
    parts = [term.amount * _open(term.name, key) for term in _strengths(terms)]
    named = not out.endswith(library.SUFFIX)
    target = library.user_dir(key) / f"{out}{library.SUFFIX}" if named else Path(out)
    _refuse_to_replace(target, force)
    mixed = replace(combine(parts), name=target.stem)
    click.echo(f"{library.save(mixed, key) if named else mixed.save(target)}")
    say(f"{_sentence(mixed)} Its limit is not known yet: mlxsteer calibrate {out}")


@command.command("push")
@click.argument("vector")
@click.argument("repo")
@name_option
@model_option
@click.option("--private", is_flag=True, help="Make the repo private if it is made now.")
def push_command(
    vector: str, repo: str, name: str | None, model_name: str | None, private: bool
) -> None:
    """Upload a vector to a Hub repo, for others to steer with as owner/repo:name.

    \b
    Example:
      mlxsteer vectors push terse me/my-vectors --model demo
    """
    from mlxsteer import hubvectors

    key = _key(model_name)
    click.echo(hubvectors.push(_open(vector, key), repo, key, name=name, private=private))


@command.command("pull")
@click.argument("vector", metavar="OWNER/REPO:NAME")
@name_option
@model_option
@click.option("--revision", metavar="REV", help="Branch, tag or commit of the repo.")
@force_option
def pull_command(
    vector: str, name: str | None, model_name: str | None, revision: str | None, force: bool
) -> None:
    """Fetch a vector from a Hub repo and keep it among yours.

    \b
    Example:
      mlxsteer vectors pull someone/vectors:terse --model demo
    """
    from mlxsteer import hubvectors, library
    from mlxsteer.vector import SteeringVector

    key = _key(model_name)
    repo, remote = hubvectors.split_name(vector)
    target = library.user_dir(key) / f"{name or remote}{library.SUFFIX}"
    _refuse_to_replace(target, force)
    fetched = SteeringVector.load(hubvectors.pull(repo, remote, key, revision=revision))
    _check_width(fetched, model_name, Path(vector))
    click.echo(f"{library.save(fetched, key, name or remote)}")


# --- names and models -------------------------------------------------------------------------


def _key(name: str | None) -> str:
    """The folder name of a model's vectors; of the default model when None."""
    from mlxsteer import library
    from mlxsteer.models.names import DEMO, resolve_model

    if name is not None:
        return library.model_key(name)
    try:
        found = resolve_model(None, allow_download=False)
    except MlxsteerError:
        return DEMO
    return library.model_key(found.alias or found.label)


def _open(name: str, key: str) -> SteeringVector:
    """The vector of that name, or in that file, foreign or ours."""
    from mlxsteer import library
    from mlxsteer.formats import import_file

    if Path(name).suffix in FOREIGN:
        return import_file(Path(name).expanduser(), warn=say)
    return library.find(name, key)


def _check_width(vector: SteeringVector, model_name: str | None, source: Path) -> None:
    """VectorError when the model is on this machine and of another width or depth."""
    from mlxsteer.models.folder import read_config
    from mlxsteer.models.names import resolve_model

    try:
        found = resolve_model(model_name, allow_download=False)
        config = read_config(found.path)
    except MlxsteerError:
        return  # not here: checked when it is loaded
    config = config.get("text_config") or config
    width, depth = config.get("hidden_size"), config.get("num_hidden_layers")
    if not width or not depth:
        return
    if width != vector.d_model or vector.layers[-1] >= depth:
        raise VectorError(
            f"{source} has width {vector.d_model} and layers up to {vector.layers[-1]};"
            f" {found.label} has width {width} and layers 0 to {depth - 1}. Say --model for the"
            " model that it was made for."
        )


def _refuse_to_replace(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise VectorError(f"{path} is there already. Add --force to replace it, or rename.")


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


def _sentence(vector: SteeringVector) -> str:
    layers = vector.layers
    return (
        f"{vector.name}: {vector.op} at {vector.site}, {len(layers)} layers ({layers[0]} to"
        f" {layers[-1]}), width {vector.d_model}."
    )
