"""`mlxsteer sae`: train, look at and exchange dictionaries of features.

Parses and prints; the work is in `mlxsteer.sae`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsteer.cli import sae_find
from mlxsteer.cli.options import (
    dtype_option,
    force_option,
    json_option,
    load_model,
    model_option,
    print_json,
    print_table,
)
from mlxsteer.cli.stored import key_of
from mlxsteer.errors import SaeError
from mlxsteer.progress import say

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.sae.build import Cost, Order
    from mlxsteer.sae.dictionary import Dictionary

ARCHITECTURES = ("batchtopk", "topk", "jumprelu")
SITES = ("residual", "ffn_out", "attn_out")
DEFAULT_CHATS = 128
REPORT_SECONDS = 10.0  # between two lines of progress


@click.group(name="sae")
def command() -> None:
    """Train and exchange sparse autoencoders: features that a second model finds.

    \b
    Examples:
      mlxsteer sae train --model demo --layer 15 --dry-run
      mlxsteer sae show residual-15-batchtopk --model demo
    """


for _command in (sae_find.index_command, sae_find.find_command, sae_find.label_command):
    command.add_command(_command)


@command.command("train")
@model_option
@click.option("--layer", type=click.IntRange(0), required=True, help="0-based; its output is read.")
@click.option("--site", type=click.Choice(SITES), default="residual", show_default=True)
@click.option("--features", type=click.IntRange(2), default=4096, show_default=True)
@click.option(
    "--k",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Features per token: exactly (topk), on average (batchtopk), aimed at (jumprelu).",
)
@click.option(
    "--architecture", type=click.Choice(ARCHITECTURES), default="batchtopk", show_default=True
)
@click.option(
    "--tokens",
    type=click.IntRange(1000),
    default=120_000,
    show_default=True,
    help="Tokens whose states are read, at most what the corpus has.",
)
@click.option(
    "--epochs",
    type=click.FloatRange(0, min_open=True),
    default=4.0,
    show_default=True,
    help="Passes over the states.",
)
@click.option(
    "--corpus",
    "sources",
    multiple=True,
    metavar="FILE",
    help='Text or .jsonl ({"text": …} or {"messages": […]}), hub:OWNER/REPO/FILE of a'
    " data set, python-docs (which come with Python), or contrast-sets (the texts of the sets)."
    " May be given several times. Default: python-docs.",
)
@click.option(
    "--self-chats",
    type=click.IntRange(0),
    help=f"Chats that the model writes for it. Default: {DEFAULT_CHATS} without --corpus, else 0.",
)
@click.option(
    "--context", type=click.IntRange(8), default=128, show_default=True, help="Tokens of a window."
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Adam's peak learning rate.",
)
@click.option("--batch", type=click.IntRange(2), default=1024, show_default=True)
@click.option("--seed", type=int, default=0)
@click.option("--name", help="What to call it. Default: SITE-LAYER-ARCHITECTURE.")
@click.option("--out", type=click.Path(file_okay=False), help="Folder to write, in place of yours.")
@click.option("--dry-run", is_flag=True, help="Print what it would cost; read and train nothing.")
@click.option("--restart", is_flag=True, help="Begin anew where an interrupted run would go on.")
@dtype_option
@force_option
@json_option
def train_command(
    model_name: str | None,
    layer: int,
    name: str | None,
    out: str | None,
    dry_run: bool,
    restart: bool,
    dtype: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a dictionary on the states after a layer.

    The cost is printed first. Interrupted, the same command goes on where it stopped, with the
    same result.

    \b
    Example:
      mlxsteer sae train --model demo --layer 15 --dry-run
    """  # fmt: skip
    from mlxsteer.sae import build, shelf

    order = _order(layer, options)
    model = load_model(model_name, dtype, force)
    name = name or f"{order.site}-{layer}-{order.recipe.architecture}"
    target = Path(out) if out else shelf.place_for(name, model.key)
    work = build.work_folder(model, order)
    _prepare(target, work, restart)
    if dry_run and order.self_chats:
        say(f"{order.self_chats} chats are left out of this estimate: they are not written yet.")
        order = replace(order, self_chats=0)
    found = build.gather(model, order)
    cost = build.estimate(model, order, found)
    if dry_run:
        _print_cost(order, cost, as_json)
        return
    _say_cost(order, cost)
    dictionary = build.build(model, order, found, target, on_step=_reporter(cost, order))
    if as_json:
        print_json({"path": target, **dictionary.about})
    else:
        _print_facts(dictionary, target)


@command.command("list")
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


@command.command("show")
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
        _print_facts(dictionary, path)


@command.command("export")
@click.argument("name")
@click.argument("folder_out", metavar="FOLDER", type=click.Path(file_okay=False))
@model_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["saelens", "saelens5", "gemma-scope"]),
    default="saelens",
    show_default=True,
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


@command.command("import")
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


def _order(layer: int, options: dict[str, Any]) -> Order:
    from mlxsteer.sae import corpus
    from mlxsteer.sae.build import Order
    from mlxsteer.sae.train import Recipe

    sources, self_chats = options["sources"], options["self_chats"]
    if self_chats is None:
        self_chats = 0 if sources else DEFAULT_CHATS
    names = ("architecture", "features", "k", "epochs", "batch", "rate", "seed")
    return Order(
        layer=layer,
        site=options["site"],
        sources=tuple(sources) or (corpus.PYTHON_DOCS,),
        self_chats=self_chats,
        tokens=options["tokens"],
        context=options["context"],
        recipe=Recipe(**{name: options[name] for name in names}),
    )


def _prepare(target: Path, work: Path, restart: bool) -> None:
    import shutil

    if restart:
        shutil.rmtree(work, ignore_errors=True)
    elif work.is_dir():
        say("Going on with the interrupted run of the same order (--restart begins anew).")
    if target.is_dir() and any(target.iterdir()):
        raise SaeError(f"{target} is there already. Add --name or --out, or remove it.")


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


def _cost_rows(order: Order, cost: Cost) -> list[list[Any]]:
    recipe = order.recipe
    return [
        ["states to read", f"{cost.tokens:,} tokens", _minutes(cost.reading_seconds)],
        [
            f"training of {recipe.features} features",
            f"{cost.seen:,} states seen",
            _minutes(cost.training_seconds),
        ],
        ["disk while it runs", f"{cost.buffer_bytes / 1e6:.0f} MB", ""],
        ["disk for the dictionary", f"{cost.dictionary_bytes / 1e6:.0f} MB", ""],
    ]


def _print_cost(order: Order, cost: Cost, as_json: bool) -> None:
    if as_json:
        print_json(asdict(cost))
        return
    print_table(["what", "how much", "about"], _cost_rows(order, cost))


def _say_cost(order: Order, cost: Cost) -> None:
    for what, much, minutes in _cost_rows(order, cost):
        say(f"{what}: {much}" + (f", about {minutes}" if minutes else ""))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def _reporter(cost: Cost, order: Order) -> Callable[[int, dict[str, float]], None]:
    total = cost.seen // order.recipe.batch
    last = [0.0]

    def report(step: int, figures: dict[str, float]) -> None:
        if time.monotonic() - last[0] < REPORT_SECONDS and step < total:
            return
        last[0] = time.monotonic()
        say(
            f"step {step}/{total}: explained variance {figures['explained_variance']:.3f},"
            f" L0 {figures['l0']:.1f}, dead {figures['dead']:.1%}"
        )

    return report


def _facts(dictionary: Dictionary) -> dict[str, Any]:
    return {
        "architecture": dictionary.architecture,
        "features": dictionary.n_features,
        "width": dictionary.d_model,
        "model": dictionary.about.get("model") or dictionary.about.get("model_name") or "-",
        "layer": "-" if dictionary.layer is None else dictionary.layer,
        "site": dictionary.site or "-",
    }


def _print_facts(dictionary: Dictionary, path: Path) -> None:
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
