"""What the `vectors` commands share: names and files become vectors, targets are kept safe.

Parsing only; where vectors lie is `library`'s knowledge, what files hold `formats`'.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxsteer.errors import MlxsteerError, VectorError
from mlxsteer.progress import say

if TYPE_CHECKING:
    from mlxsteer.vector import SteeringVector

FOREIGN = (".gguf", ".f32")

name_option = click.option("--name", metavar="NAME", help="What to call the vector.")
force_option = click.option("--force", is_flag=True, help="Replace a file that is there already.")


def key_of(name: str | None) -> str:
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


def open_vector(name: str, key: str) -> SteeringVector:
    """The vector of that name, or in that file, foreign or ours."""
    from mlxsteer import library
    from mlxsteer.formats import import_file

    if Path(name).suffix in FOREIGN:
        return import_file(Path(name).expanduser(), warn=say)
    return library.find(name, key)


def check_width(vector: SteeringVector, model_name: str | None, source: Path) -> None:
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


def refuse_to_replace(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise VectorError(f"{path} is there already. Add --force to replace it, or rename.")


def sentence(vector: SteeringVector) -> str:
    layers = vector.layers
    return (
        f"{vector.name}: {vector.op} at {vector.site}, {len(layers)} layers ({layers[0]} to"
        f" {layers[-1]}), width {vector.d_model}."
    )
