"""`mlxsteer vectors compare` and `lens`: how alike vectors are, and what one says in words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsteer.cli.options import (
    dtype_option,
    json_option,
    layer_list,
    load_model,
    model_option,
    print_json,
    print_table,
)
from mlxsteer.cli.stored import FOREIGN, key_of, open_vector
from mlxsteer.errors import MlxsteerError, UsageError
from mlxsteer.progress import say
from mlxsteer.repl_output import harmless

if TYPE_CHECKING:
    from mlxsteer.lens import LensReading, TokenScore
    from mlxsteer.similarity import Similarity
    from mlxsteer.vector import SteeringVector

NEAREST = 3
WIDEST_NAMED = 8  # vectors whose names still fit as heads of a matrix; beyond, numbers


@click.command("compare")
@click.argument("vectors", nargs=-1, metavar="[VECTOR]...")
@model_option
@click.option("--per-layer", is_flag=True, help="The cosines of every layer, not only the mean.")
@json_option
def compare_command(
    vectors: tuple[str, ...], model_name: str | None, per_layer: bool, as_json: bool
) -> None:
    """Show how alike vectors are: 1 the same direction, 0 unrelated, -1 opposite.

    VECTOR is a name, a file or a directory of them; without any, all of the model's vectors are
    compared. Figures are mean cosines over the layers that two vectors share, weighted by the
    dose that the layers get. No model is loaded.

    \b
    Examples:
      mlxsteer vectors compare terse formal --model demo
      mlxsteer vectors compare --per-layer terse ./mine.safetensors
    """
    from mlxsteer.similarity import compare

    labels, opened = _opened(vectors, key_of(model_name))
    pairs = compare(opened)
    if len({vector.model.get("base_model") or "" for vector in opened} - {""}) > 1:
        say("These vectors were made on different models: their cosines mean nothing.")
    if as_json:
        print_json(_compared(labels, pairs))
        return
    _print_matrix(labels, pairs)
    if per_layer:
        _print_layers(labels, pairs)


@click.command("lens")
@click.argument("vector")
@model_option
@click.option("--layer", "layers", metavar="SPANS", help="Layers to look at, such as 12 or 9-20.")
@click.option("--top", type=click.IntRange(1), default=10,
              help="Tokens to show at either end.")  # fmt: skip
@dtype_option
@json_option
def lens_command(
    vector: str,
    model_name: str | None,
    layers: str | None,
    top: int,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Show the tokens that a vector promotes and suppresses through the model's own head.

    This is the direct way to the output. What later layers make of the direction is not in it,
    so a vector of middle layers may steer well and still read as noise here, on small models
    above all. Without --layer: the mean of its layers, weighted by the dose they get.

    \b
    Example:
      mlxsteer vectors lens terse --model demo --layer 18-20
    """
    wanted = layer_list(layers)
    opened = open_vector(vector, key_of(model_name))
    model = load_model(model_name, dtype)
    from mlxsteer.lens import lens

    readings = lens(model, opened, wanted, top)
    if as_json:
        facts = {"vector": opened.name, "model": model.label}
        print_json(facts | {"readings": [_reading(reading) for reading in readings]})
    elif wanted is None or len(wanted) == 1:
        _print_reading(readings[0])
    else:
        _print_readings(readings)


# --- compare --------------------------------------------------------------------------------------


def _opened(names: Sequence[str], key: str) -> tuple[list[str], list[SteeringVector]]:
    """(labels, vectors) of names, files and directories; of all the model's when there are none.

    Labels are the vectors' names; where two are alike, what was typed.
    """
    from mlxsteer import library

    given = list(names) or list(library.available(key))
    sources = [source for name in given for source in _sources(name)]
    found = []
    for source in sources:
        try:
            found.append((source, open_vector(source, key)))
        except MlxsteerError as error:
            if source in names:
                raise
            say(f"{source} is left out: {error}")
    if len(found) < 2:
        raise UsageError(
            f"Two vectors or more are needed to compare, and there {'is' if found else 'are'}"
            f" {len(found) or 'none'}. Type e.g. mlxsteer vectors compare terse formal"
        )
    often = Counter(vector.name for _, vector in found)
    labels = [vector.name if often[vector.name] == 1 else source for source, vector in found]
    return labels, [vector for _, vector in found]


def _sources(name: str) -> list[str]:
    """The vector files in a directory, or the name itself."""
    from mlxsteer.library import SUFFIX

    folder = Path(name).expanduser()
    if not folder.is_dir():
        return [name]
    return [str(path) for path in sorted(folder.iterdir()) if path.suffix in (SUFFIX, *FOREIGN)]


def _compared(labels: Sequence[str], pairs: Sequence[Similarity]) -> dict[str, Any]:
    places = _places(len(labels))
    return {
        "vectors": list(labels),
        "weighting": "layer share",
        "pairs": [
            {"a": labels[i], "b": labels[j], "mean": pair.mean, "cosines": pair.cosines}
            for (i, j), pair in zip(places, pairs, strict=True)
        ],
    }


def _places(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def _print_matrix(labels: Sequence[str], pairs: Sequence[Similarity]) -> None:
    places = _places(len(labels))
    means = {at: pair.mean for at, pair in zip(places, pairs, strict=True)}
    means |= {(i, i): 1.0 for i in range(len(labels))}
    named = len(labels) <= WIDEST_NAMED
    shown = list(labels) if named else [f"{i + 1} {label}" for i, label in enumerate(labels)]
    heads = labels if named else [str(i + 1) for i in range(len(labels))]
    rows = [
        [label, *(_cosine(means.get((min(i, j), max(i, j)))) for j in range(len(labels)))]
        for i, label in enumerate(shown)
    ]
    print_table(["", *heads], rows)
    ranked = sorted((m, at) for at, m in means.items() if at[0] != at[1] and m is not None)
    if len(labels) > 2 and ranked:
        for word, ends in (("Most alike", ranked[::-1]), ("Most opposed", ranked)):
            nearest = [f"{labels[i]} and {labels[j]} {m:.2f}" for m, (i, j) in ends[:NEAREST]]
            click.echo(f"{word}: {'; '.join(nearest)}")


def _print_layers(labels: Sequence[str], pairs: Sequence[Similarity]) -> None:
    layers = sorted({layer for pair in pairs for layer in pair.cosines})
    rows = [
        [labels[i], labels[j], *(_cosine(pair.cosines.get(layer)) for layer in layers)]
        for (i, j), pair in zip(_places(len(labels)), pairs, strict=True)
    ]
    click.echo("\nPer layer:")
    print_table(["", "", *map(str, layers)], rows)


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# --- lens -----------------------------------------------------------------------------------------


def _reading(reading: LensReading) -> dict[str, Any]:
    def plain(items: Sequence[TokenScore]) -> list[dict[str, Any]]:
        return [{"token": item.token, "text": item.text, "score": item.score} for item in items]

    return {
        "layer": reading.layer,
        "promoted": plain(reading.promoted),
        "suppressed": plain(reading.suppressed),
    }


def _print_reading(reading: LensReading) -> None:
    rows = [
        [_quoted(up), f"{up.score:+.1f}", _quoted(down), f"{down.score:+.1f}"]
        for up, down in zip(reading.promoted, reading.suppressed, strict=True)
    ]
    print_table(["promotes", "score", "suppresses", "score"], rows)


def _print_readings(readings: Sequence[LensReading]) -> None:
    rows = [
        [str(r.layer), " ".join(map(_quoted, r.promoted)), " ".join(map(_quoted, r.suppressed))]
        for r in readings
    ]
    print_table(["layer", "promotes", "suppresses"], rows)


def _quoted(item: TokenScore) -> str:
    """The text in quotes, blanks and line ends seen as JSON writes them."""
    return harmless(json.dumps(item.text, ensure_ascii=False))
