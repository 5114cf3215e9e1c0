"""`mlxsteer sae train`: what a dictionary would cost, and making it.

Parses and prints; the work is in `mlxsteer.sae`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsteer.cli.options import load_model, model_option, print_json, print_table, run_options
from mlxsteer.cli.sae_shelf import SITES, print_facts
from mlxsteer.errors import SaeError
from mlxsteer.progress import say

if TYPE_CHECKING:
    from mlxsteer.sae.build import Cost, Order

ARCHITECTURES = ("batchtopk", "topk", "jumprelu")
DEFAULT_CHATS = 128
REPORT_SECONDS = 10.0  # between two lines of progress


@click.command("train")
@model_option
@click.option("--layer", type=click.IntRange(0), required=True, help="0-based; its output is read.")
@click.option("--site", type=click.Choice(SITES), default="residual",
              help="Where states are read.")  # fmt: skip
@click.option("--features", type=click.IntRange(2), default=4096,
              help="How many the dictionary holds.")  # fmt: skip
@click.option(
    "--k",
    type=click.IntRange(1),
    default=32,
    help="Features per token: exactly (topk), on average (batchtopk), aimed at (jumprelu).",
)
@click.option(
    "--architecture",
    type=click.Choice(ARCHITECTURES),
    default="batchtopk",
    help="Features that stay on: the largest of a batch (batchtopk) or of each token"
    " (topk), or those above a learned threshold (jumprelu).",
)
@click.option(
    "--tokens",
    type=click.IntRange(1000),
    default=120_000,
    help="Tokens whose states are read, at most what the corpus has.",
)
@click.option(
    "--epochs",
    type=click.FloatRange(0, min_open=True),
    default=4.0,
    help="Passes over the states.",
)
@click.option(
    "--corpus",
    "sources",
    multiple=True,
    metavar="FILE",
    help='Text or .jsonl ({"text": …} or {"messages": […]}), hub:OWNER/REPO/FILE of a'
    " data set, python-docs (which come with Python), or contrast-sets (the texts of the sets)."
    " May be given several times. Default: the last two.",
)
@click.option(
    "--self-chats",
    type=click.IntRange(0),
    help=f"Chats that the model writes for it. Default: {DEFAULT_CHATS} without --corpus, else 0.",
)
@click.option("--context", type=click.IntRange(8), default=128, help="Tokens of a window.")
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=1e-3,
    help="Adam's peak learning rate.",
)
@click.option("--batch", type=click.IntRange(2), default=1024,
              help="States in a step of training.")  # fmt: skip
@click.option("--seed", type=int, default=0, help="Of the texts, the weights and their order.")
@click.option("--name", help="What to call it. Default: SITE-LAYER-ARCHITECTURE.")
@click.option("--out", type=click.Path(file_okay=False), help="Folder to write, in place of yours.")
@click.option("--dry-run", is_flag=True, help="Print what it would cost; read and train nothing.")
@click.option("--restart", is_flag=True, help="Begin anew where an interrupted run would go on.")
@run_options
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
    _prepare(target, work, restart and not dry_run)
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
        print_facts(dictionary, target)


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
        sources=tuple(sources) or corpus.AT_HAND,
        self_chats=self_chats,
        tokens=options["tokens"],
        context=options["context"],
        recipe=Recipe(**{name: options[name] for name in names}),
    )


def _prepare(target: Path, work: Path, restart: bool) -> None:
    import shutil

    if target.is_dir() and any(target.iterdir()):
        raise SaeError(f"{target} is there already. Add --name or --out, or remove it.")
    if restart:
        shutil.rmtree(work, ignore_errors=True)
    elif work.is_dir():
        say("Going on with the interrupted run of the same order (--restart begins anew).")


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
