"""`mlxsteer sae list, show, export, import`: the dictionaries that you have.

Parses and prints; the work is in `mlxsteer.sae`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsteer.cli.options import json_option, load_model, model_option, print_json, print_table
from mlxsteer.cli.stored import key_of
from mlxsteer.errors import SaeError
from mlxsteer.progress import say

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.sae.dictionary import Dictionary

SITES = ("residual", "ffn_out", "attn_out")


@click.command("list")
@model_option
@json_option
def list_command(model_name: str | None, as_json: bool) -> None:
    """List your dictionaries for a model.

    \b
    Example:
      mlxsteer sae list --model demo
    """
    from mlxsteer.sae import shelf

    key = key_of(model_name)
    rows = [{"name": name, "path": path} for name, path in shelf.available(key).items()]
    if as_json:
        print_json({"model": key, "dictionaries": rows})
    elif rows:
        print_table(["name", "folder"], [[row["name"], row["path"]] for row in rows])
    else:
        say(f"No dictionaries for {key} yet. Train one: mlxsteer sae train --layer 15 --dry-run")


@click.command("show")
@click.argument("name")
@model_option
@json_option
def show_command(name: str, model_name: str | None, as_json: bool) -> None:
    """Say what the dictionary NAME (or a folder) is, and how good it is.

    \b
    Example:
      mlxsteer sae show residual-15-batchtopk --model demo
    """
    from mlxsteer.sae import folder, shelf

    path = shelf.find(name, key_of(model_name))
    dictionary = folder.read(path)
    if as_json:
        print_json({"path": path, **_facts(dictionary), **dictionary.about})
    else:
        print_facts(dictionary, path)


@click.command("export")
@click.argument("name")
@click.argument("folder_out", metavar="FOLDER", type=click.Path(file_okay=False))
@model_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["saelens", "saelens5", "gemma-scope"]),
    default="saelens",
    help="saelens: version 6 and later; saelens5: before; gemma-scope: params.npz.",
)
@click.option("--force", is_flag=True, help="Replace a dictionary that is there already.")
def export_command(
    name: str, folder_out: str, model_name: str | None, form: str, force: bool
) -> None:
    """Write the dictionary NAME into FOLDER for other tools.

    \b
    Example:
      mlxsteer sae export residual-15-batchtopk ./for-saelens --model demo
    """  # fmt: skip
    from mlxsteer.sae import folder, shelf

    dictionary = shelf.load(name, key_of(model_name))
    target = Path(folder_out)
    _refuse_replacing(target, force)
    click.echo(f"Written to {folder.write(dictionary, target, form)}")


@click.command("import")
@click.argument("source", type=click.Path(exists=True))
@model_option
@click.option("--name", help="What to call it. Default: the folder's name.")
@click.option("--layer", type=click.IntRange(0), help="0-based, where the files do not say.")
@click.option("--site", type=click.Choice(SITES), help="Where the files do not say.")
@click.option("--force", is_flag=True, help="Replace a dictionary of that name.")
def import_command(
    source: str,
    model_name: str | None,
    name: str | None,
    layer: int | None,
    site: str | None,
    force: bool,
) -> None:
    """Take a SAELens folder or a Gemma-Scope file among yours.

    \b
    Example:
      mlxsteer sae import ./layer_15 --model demo --layer 15
    """
    from mlxsteer.sae import folder, shelf

    dictionary = folder.read(source)
    placed: dict[str, Any] = {"layer": dictionary.layer if layer is None else layer}
    placed |= {"site": site or dictionary.site or "residual"}
    if placed["layer"] is None:
        raise SaeError(f"{source} does not say after which layer it reads. Add --layer 15.")
    model = load_model(model_name)
    _check_fits(dictionary, int(placed["layer"]), model)
    path = Path(source)
    target = shelf.place_for(name or (path.parent if path.is_file() else path).name, model.key)
    _refuse_replacing(target, force)
    about = {**dictionary.about, **placed, "model": model.label}
    folder.write(replace(dictionary, about=about), target)
    click.echo(f"Kept in {target}")


# --- small pieces -----------------------------------------------------------------------------


def _refuse_replacing(target: Path, force: bool) -> None:
    if target.is_dir() and any(target.iterdir()) and not force:
        raise SaeError(f"{target} is there already. Add --force to replace it.")


def _check_fits(dictionary: Dictionary, layer: int, model: Model) -> None:
    if dictionary.d_model != model.d_model:
        raise SaeError(
            f"It is for states of width {dictionary.d_model}; {model.label} has {model.d_model}."
        )
    if layer >= model.n_layers:
        raise SaeError(
            f"Layer {layer} is out of range: {model.label} has layers 0 to {model.n_layers - 1}."
        )


def _facts(dictionary: Dictionary) -> dict[str, Any]:
    return {
        "architecture": dictionary.architecture,
        "features": dictionary.n_features,
        "width": dictionary.d_model,
        "model": dictionary.about.get("model") or dictionary.about.get("model_name") or "-",
        "layer": "-" if dictionary.layer is None else dictionary.layer,
        "site": dictionary.site or "-",
    }


def print_facts(dictionary: Dictionary, path: Path) -> None:
    """What a dictionary is and how well it does, a line a fact."""
    rows = [[what, value] for what, value in _facts(dictionary).items()]
    about = dictionary.about
    trained = about.get("training_architecture")
    rows += [["trained as", trained]] if trained else []
    if fit := about.get("fit"):
        rows += [
            ["explained variance", f"{fit['explained_variance']:.3f}"],
            ["L0", f"{fit['l0']:.1f}"],
            ["dead", f"{fit['dead']:.1%} of features"],
        ]
    if splice := about.get("splice"):
        rows.append(["loss recovered", f"{splice['recovered']:.3f} (zeros), "
                     f"{splice['recovered_from_mean']:.3f} (mean state)"])  # fmt: skip
    rows += [["read from", f"{about['tokens']:,} tokens"]] if "tokens" in about else []
    print_table(["what", "value"], [*rows, ["folder", path]])
