"""`mlxsteer vectors import, export, push, pull`: vectors that come from and go to others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlxsteer.cli.options import layer_list, model_option
from mlxsteer.cli.stored import (
    check_width,
    force_option,
    key_of,
    name_option,
    open_vector,
    refuse_to_replace,
    sentence,
)
from mlxsteer.progress import say


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@model_option
@name_option
@click.option(
    "--gguf-base",
    default="exact",
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

    key = key_of(model_name)
    vector = import_file(file, name=name, layers=layer_list(layers), warn=say, **told)
    check_width(vector, model_name, file)
    target = library.user_dir(key) / f"{vector.name}{library.SUFFIX}"
    refuse_to_replace(target, force)
    path = library.save(vector, key)
    click.echo(f"{path}")
    unit = "r" if vector.op == "add" and vector.residual_norm is None else ""
    how = f"--model {model_name or key} --steer {vector.name}:1{unit}"
    say(f"{sentence(vector)} Try: mlxsteer chat {how}")


@click.command("export")
@click.argument("vector")
@click.argument("out", type=click.Path(path_type=Path))
@model_option
@click.option("--format", "format_", metavar="FORMAT", help="gguf, glp, ds4 or safetensors.")
@click.option(
    "--gguf-base",
    default="exact",
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

    opened = open_vector(vector, key_of(model_name))
    refuse_to_replace(out, force)
    if out.suffix == ".f32":
        refuse_to_replace(out.with_suffix(".json"), force)
    for path in export_file(opened, out, format_, warn=say, **told):
        click.echo(f"{path}")


@click.command("push")
@click.argument("vector")
@click.argument("repo")
@model_option
@name_option
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

    key = key_of(model_name)
    click.echo(hubvectors.push(open_vector(vector, key), repo, key, name=name, private=private))


@click.command("pull")
@click.argument("vector", metavar="OWNER/REPO:NAME")
@model_option
@name_option
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

    key = key_of(model_name)
    repo, remote = hubvectors.split_name(vector)
    target = library.user_dir(key) / f"{name or remote}{library.SUFFIX}"
    refuse_to_replace(target, force)
    fetched = SteeringVector.load(hubvectors.pull(repo, remote, key, revision=revision))
    check_width(fetched, model_name, Path(vector))
    click.echo(f"{library.save(fetched, key, name or remote)}")
