"""`mlxsteer models`: what `--model` can name here, and fetching one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlxsteer.cli.options import json_option, print_json, print_table
from mlxsteer.errors import MlxsteerError


@click.group("models")
def command() -> None:
    """See which models are at hand; fetch one.

    \b
    Example:
      mlxsteer models list
    """


@command.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List aliases, converted folders, their sizes, and the default.

    \b
    Example:
      mlxsteer models list --json
    """
    from mlxsteer.doctor import diagnose

    report = diagnose()
    default = _default_path()
    rows = [_facts(found.name, found.path, default) for found in report.models]
    if as_json:
        print_json({"models": rows, "default": report.model, "settings": report.paths["settings"]})
        return
    print_table(
        ["model", "size", "", "folder"],
        [
            [row["name"], _size(row["bytes"]), "default" if row["default"] else "", _where(row)]
            for row in rows
        ],
    )
    click.echo(f"A default and aliases of your own go in {report.paths['settings']}", err=True)


@command.command("pull")
@click.argument("name")
@json_option
def pull_command(name: str, as_json: bool) -> None:
    """Fetch the model NAME (demo, or a Hub repo) and print its folder.

    \b
    Example:
      mlxsteer models pull demo
    """
    from mlxsteer.models.names import resolve_model

    found = resolve_model(name, allow_download=True)
    if as_json:
        print_json(_facts(name, str(found.path), None))
    else:
        click.echo(str(found.path))


def _default_path() -> Path | None:
    from mlxsteer.models.names import resolve_model

    try:
        return resolve_model(None, allow_download=False).path
    except MlxsteerError:
        return None


def _facts(name: str, path: str | None, default: Path | None) -> dict[str, Any]:
    """path and bytes are None where the model is yet to be fetched, or is a Hub repo."""
    folder = Path(path).expanduser() if path else None
    here = folder is not None and folder.is_dir()
    files = [file for file in folder.rglob("*") if file.is_file()] if folder and here else []
    return {
        "name": name,
        "path": path,
        "bytes": sum(file.stat().st_size for file in files) if here else None,
        "default": default is not None and folder == default,
    }


def _size(nbytes: int | None) -> str:
    if nbytes is None:
        return "-"
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def _where(row: dict[str, Any]) -> str:
    return row["path"] or f"not here yet: mlxsteer models pull {row['name']}"
