"""`mlxsteer vectors explain`: a vector as features of a dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlxsteer.cli.options import (
    dtype_option,
    json_option,
    load_model,
    model_option,
    print_json,
    print_table,
)
from mlxsteer.cli.stored import open_vector
from mlxsteer.errors import ContrastError

if TYPE_CHECKING:
    from mlxsteer.contrast import ContrastSet
    from mlxsteer.sae.find import Part
    from mlxsteer.vector import SteeringVector


@click.command("explain")
@click.argument("vector")
@model_option
@click.option("--sae", "sae_name", metavar="NAME", help="Which dictionary. Default: the only one.")
@click.option("--top", type=click.IntRange(1), default=6,
              help="Features to show at either end.")  # fmt: skip
@dtype_option
@json_option
def explain_command(
    vector: str,
    model_name: str | None,
    sae_name: str | None,
    top: int,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Show VECTOR as features of a sparse autoencoder, the most alike and the most opposed.

    cosine: of the vector with the feature's direction at the dictionary's layer. contrast: how
    much more of the feature the states of the vector's own positive pole hold than those of its
    negative one, in shares of the residual norm.

    \b
    Example:
      mlxsteer vectors explain golden-gate --model demo
    """
    from mlxsteer.cli.sae_find import opened
    from mlxsteer.sae import find, index

    model = load_model(model_name, dtype)
    steering = open_vector(vector, model.key)
    path, dictionary = opened(sae_name, model)
    parts = find.explain(model, dictionary, index.read(path), steering, _set_of(steering))
    ends = parts[:top], parts[::-1][:top]
    if as_json:
        alike, opposed = ([part.row() for part in end] for end in ends)
        print_json({"vector": steering.name, "alike": alike, "opposed": opposed})
        return
    for title, end in zip(("Most alike", "Most opposed"), ends, strict=True):
        click.echo(f"{title}:")
        _print(end)


def _set_of(vector: SteeringVector) -> ContrastSet | None:
    from mlxsteer.contrast import ContrastSet

    name = vector.about.get("contrast_set")
    try:
        return ContrastSet.load(name) if name else None
    except ContrastError:
        return None  # it came with a set that is not here


def _print(parts: list[Part]) -> None:
    from mlxsteer.cli.sae_find import FEATURE_HEADS, feature_cells, snippet_line

    rows = [
        [
            *feature_cells(part.feature),
            f"{part.cosine:+.3f}",
            "-" if part.contrast is None else f"{part.contrast:+.3f}",
            snippet_line(part.feature, 0),
        ]
        for part in parts
    ]
    print_table([*FEATURE_HEADS, "cosine", "contrast", "fires on"], rows)
