"""`mlxsteer sae index`, `find` and `label`: what the features of a dictionary are.

Parses and prints; the work is in `mlxsteer.sae`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsteer.cli.options import (
    dtype_option,
    json_option,
    load_model,
    model_option,
    number_list,
    print_json,
    print_table,
)
from mlxsteer.cli.stored import key_of
from mlxsteer.errors import SaeError, UsageError
from mlxsteer.progress import say
from mlxsteer.repl_output import harmless

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.sae.dictionary import Dictionary
    from mlxsteer.sae.index import Feature

SHOWN_SNIPPET = 40  # characters on either side of the token

sae_option = click.option(
    "--sae", "sae_name", metavar="NAME", help="Which dictionary. Default: the only one."
)


@click.command("index")
@click.argument("name")
@model_option
@click.option(
    "--corpus",
    "sources",
    multiple=True,
    metavar="FILE",
    help="Text to read, as for train. May be given several times. Default: what the dictionary was"
    " trained on.",
)
@click.option("--tokens", type=click.IntRange(100), default=50_000,
              help="Tokens to read, at most what the text has.")  # fmt: skip
@dtype_option
def index_command(
    name: str, model_name: str | None, sources: tuple[str, ...], tokens: int, dtype: str | None
) -> None:
    """Note where each feature of the dictionary NAME fires, for find, label and the panel.

    A dictionary that was trained here has its index already; one from outside needs a text.

    \b
    Example:
      mlxsteer sae index demo --model demo --corpus contrast-sets
    """
    from mlxsteer.sae import build, corpus, index, indexing

    model = load_model(model_name, dtype)
    path, dictionary = opened(name, model)
    if sources:
        texts = [corpus.windows(model, corpus.documents(source)) for source in sources]
        found = corpus.shared_out([list(part) for part in texts], tokens, 0)
    else:
        found = build.kept_windows(path)
    if not found:
        raise SaeError(f"{name} came without its text. Give one: --corpus contrast-sets")
    made = indexing.build(model, dictionary, found, tokens=tokens)
    click.echo(f"{len(made.features)} features fire. Kept in {index.write(made, path)}")


@click.command("find")
@click.argument("text", default="")
@model_option
@sae_option
@click.option("--prompts", metavar="SET", help="A contrast set (name or .yaml) in place of TEXT.")
@click.option("--words", is_flag=True, help="Search labels, tokens and snippets; load no model.")
@click.option("--by", type=click.Choice(["contrast", "effect"]), default="contrast",
              help="What they are ranked by.")  # fmt: skip
@click.option("--top", type=click.IntRange(1), default=8,
              help="Features to show.")  # fmt: skip
@click.option("--snippets", type=click.IntRange(0), default=2,
              help="Texts to show of each.")  # fmt: skip
@dtype_option
@json_option
def find_command(
    text: str,
    model_name: str | None,
    sae_name: str | None,
    prompts: str | None,
    words: bool,
    by: str,
    top: int,
    snippets: int,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Find features that go with TEXT, or with the positive pole of a contrast set.

    contrast: how much more of it the states hold there than elsewhere, in shares of the residual
    norm. effect: what a push along it adds to the text's log-probability, nats a token.

    \b
    Examples:
      mlxsteer sae find "golden gate bridge" --model demo
      mlxsteer sae find --prompts golden-gate --model demo --by effect
    """
    from mlxsteer.contrast import ContrastSet
    from mlxsteer.sae import find, index

    if text.strip() and prompts:
        raise UsageError("A text and --prompts are two searches. Leave one of them out.")
    if words and prompts:
        raise UsageError("--words searches for a TEXT. Leave out --prompts.")
    if words and by == "effect":
        raise UsageError("--words asks no model for an effect. Leave out --by effect or --words.")
    if not text.strip() and not prompts:
        raise UsageError('Give a text or --prompts SET. Type e.g. sae find "golden gate bridge".')
    if words:
        path = chosen(sae_name, key_of(model_name))
        _print([(f, {}) for f in index.search(index.read(path), text, top)], snippets, as_json)
        return
    contrast_set = ContrastSet.load(prompts) if prompts else None
    model = load_model(model_name, dtype)
    path, dictionary = opened(sae_name, model)
    known = index.read(path)
    if contrast_set is not None:
        found = find.by_set(model, dictionary, known, contrast_set)
    else:
        found = find.by_text(model, dictionary, known, text)
    if by == "effect":
        found.sort(key=lambda one: -(one.effect or 0.0))
    rows = [(f.feature, {"contrast": f.contrast, "effect": f.effect}) for f in found[:top]]
    _print(rows, snippets, as_json)


@click.command("label")
@click.argument("features", default="")
@model_option
@sae_option
@click.option("--count", type=click.IntRange(1), default=10,
              help="Features drawn by lot, where FEATURES names none.")  # fmt: skip
@click.option("--seed", type=int, default=0,
              help="Which features and snippets are drawn.")  # fmt: skip
@click.option("--namer", default="local", metavar="local|words|URL",
              help="The model itself, the words that snippets share (no model runs), or an endpoint"
              " that speaks chat completions.")  # fmt: skip
@click.option("--namer-model", metavar="NAME", help="The endpoint's model.")
@dtype_option
@json_option
def label_command(
    features: str,
    model_name: str | None,
    sae_name: str | None,
    count: int,
    seed: int,
    namer: str,
    namer_model: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Let a model name FEATURES (such as 12,40), and test the names on held-out snippets.

    detected: the share of pairs in which the namer, given the name alone, tells a snippet that
    the feature fires on from one that it is silent in; 0.5 is chance. Names below 0.7 say little.

    \b
    Example:
      mlxsteer sae label --count 10 --model demo
    """
    from mlxsteer.judgebackends import EndpointJudge, LocalJudge
    from mlxsteer.sae import index, label, labels
    from mlxsteer.sae.label import ModelNamer
    from mlxsteer.sae.wordnames import WordNamer

    if namer in ("local", "words") and namer_model:
        raise UsageError("--namer-model goes with --namer URL. Give both.")
    if namer not in ("local", "words") and "://" not in namer:
        raise UsageError(f"{namer!r} is no namer. Give local, words, or http://localhost:8000/v1.")
    if namer not in ("local", "words") and not namer_model:
        raise UsageError("An endpoint serves several models. Say which: --namer-model NAME.")
    named = number_list(features, int, "features", "12,40") if features.strip() else ()
    who: label.Namer
    if namer == "local":
        model = load_model(model_name, dtype)
        path, who, by = chosen(sae_name, model.key), ModelNamer(LocalJudge(model)), model.label
        known = index.read(path)
    else:
        path = chosen(sae_name, key_of(model_name))
        known = index.read(path)
        who, by = WordNamer(known), namer
        if namer_model:
            who, by = ModelNamer(EndpointJudge(namer, namer_model)), namer_model
    numbers = list(named) or label.choose(known, count, seed)
    file = path / labels.LABELS

    def keep(number: int, one: labels.Label) -> None:
        """As each is found: a namer that fails at the tenth loses none of the nine."""
        labels.keep(path, {number: one})
        say(f"{number}: {one.text} ({one.accuracy:.2f})")

    made = label.label(known, numbers, who, by, seed=seed, on_label=keep)
    if as_json:
        print_json({"path": file, "labels": {n: vars(one) for n, one in made.items()}})
        return
    rows = [[n, harmless(o.text), o.accuracy, o.pairs, f"{o.bias:+.2f}"] for n, o in made.items()]
    print_table(["feature", "label", "detected", "pairs", "position bias"], rows)
    mean = sum(one.accuracy for one in made.values()) / max(1, len(made))
    click.echo(f"Detected on average: {mean:.2f} (chance 0.50). Kept in {file}")


# --- small pieces -----------------------------------------------------------------------------


def chosen(name: str | None, key: str) -> Path:
    """The folder of the dictionary called `name`; of the only one when None."""
    from mlxsteer.sae import shelf

    if name is not None:
        return shelf.find(name, key)
    known = shelf.available(key)
    if len(known) == 1:
        return next(iter(known.values()))
    if not known:
        raise SaeError(
            f"There is no dictionary for {key}. Train one: mlxsteer sae train --layer 15 --dry-run"
        )
    raise UsageError(f"{key} has several dictionaries. Add --sae {' or --sae '.join(known)}.")


def opened(name: str | None, model: Model) -> tuple[Path, Dictionary]:
    """(folder, dictionary) of that name, checked against the model."""
    from mlxsteer.sae import features

    path = chosen(name, model.key)
    dictionary = features.opened(path)
    if dictionary.d_model != model.d_model:
        raise SaeError(
            f"{path.name} is for states of width {dictionary.d_model}; {model.label} has"
            f" {model.d_model}. Say --model for the model that it reads."
        )
    return path, dictionary


def feature_cells(feature: Feature) -> list[Any]:
    """A feature's cells of a table: number, label, density, largest activation, tokens."""
    name = f"{feature.label.text} ({feature.label.accuracy:.2f})" if feature.label else "-"
    tokens = " ".join(token.strip() for token in feature.promoted[:4])
    number = str(feature.index)
    return [number, harmless(name), f"{feature.density:.2%}", feature.maximum, harmless(tokens)]


FEATURE_HEADS = ["feature", "label", "density", "largest", "promotes"]


def snippet_line(feature: Feature, which: int) -> str:
    """One of its snippets on a line, the token in « »."""
    one = feature.snippets[which]
    before, after = " ".join(one.before.split()), " ".join(one.after.split())
    return harmless(f"{before[-SHOWN_SNIPPET:]} «{one.token.strip()}» {after[:SHOWN_SNIPPET]}")


def _print(
    found: Sequence[tuple[Feature, dict[str, float | None]]], snippets: int, as_json: bool
) -> None:
    if as_json:
        print_json({"features": [{**feature.row(), **more} for feature, more in found]})
        return
    if not found:
        say("No feature's label, tokens or snippets hold these words.")
        return
    extra = list(found[0][1])
    cells = [
        [
            *feature_cells(f),
            *("-" if more[name] is None else f"{more[name]:+.3f}" for name in extra),
        ]
        for f, more in found
    ]
    print_table([*FEATURE_HEADS, *extra], cells)
    for feature, _ in found if snippets else []:
        click.echo("")
        for which in range(min(snippets, len(feature.snippets))):
            click.echo(f"{feature.index}: {snippet_line(feature, which)}")
