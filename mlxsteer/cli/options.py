"""Options that several commands share, and small ways of printing. Parsing and printing only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlxsteer.errors import UsageError

if TYPE_CHECKING:
    from mlxsteer.generation import Sampling
    from mlxsteer.model import Model

Number = TypeVar("Number", int, float)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model_option: Decorator = click.option(
    "--model",
    "-m",
    "model_name",
    metavar="NAME",
    help="A folder, a Hub repo, or an alias (demo, v4-flash). Default: your configured model,"
    " else a converted V4-Flash, else demo.",
)
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
force_option: Decorator = click.option(
    "--force", is_flag=True, help="Go on where memory looks short or a vector is of another model."
)
dtype_option: Decorator = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Precision of the activations. Default: as stored on Metal, float32 on the CPU.",
)
steer_option: Decorator = click.option(
    "--steer",
    "-s",
    multiple=True,
    metavar="TEXT",
    help="Steering, e.g. terse:3 or 'terse:3, formal:-1@think'; also for a while"
    " ('terse:3@first(40)') or on a condition ('terse:3@when(formal>0.5)'). The whole grammar:"
    " docs/grammar.md. May be given several times.",
)


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--dtype, --force and --json: the last options of a command that runs a model."""
    return dtype_option(force_option(json_option(function)))


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of mlxsteer.generation.Sampling."""
    options = (
        click.option("--max-tokens", type=click.IntRange(1), default=512,
                     help="Tokens of an answer, at most."),
        click.option("--temp", type=click.FloatRange(0), default=0.0,
                     help="0 is greedy: always the likeliest token."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0,
                     help="Draw from the likeliest tokens that make up this share; 1 is off."),
        click.option("--top-k", type=click.IntRange(0), default=0,
                     help="Draw from this many of the likeliest tokens; 0 is off."),
        click.option("--min-p", type=click.FloatRange(0, 1), default=0.0,
                     help="Leave out tokens below this share of the likeliest one's chance."),
        click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True),
                     help="Above 1: what was written lately becomes less likely."),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


SAMPLING_FIELDS = (
    "max_tokens",
    "temp",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
)


def take_sampling(options: dict[str, Any]) -> Sampling:
    """The Sampling of a command's keyword arguments; removes them from `options`."""
    from mlxsteer.generation import Sampling

    return Sampling(**{name: options.pop(name) for name in SAMPLING_FIELDS})


def load_model(name: str | None, dtype: str | None = None, force: bool = False) -> Model:
    """The model; says on stderr which one, where the user did not name it."""
    from mlxsteer.model import load

    model = load(name, dtype=dtype, force=force)
    if name is None:
        click.echo(f"Model: {model.label}. {model.why}", err=True)
    return model


def layer_list(text: str | None) -> tuple[int, ...] | None:
    """`9-12,20` as (9, 10, 11, 12, 20)."""
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            first, last = int(low), int(high) if dash else int(low)
        except ValueError:
            raise UsageError(f"{part.strip()!r} is no layer. Type e.g. 9-20 or 3,7,12.") from None
        if last < first:
            raise UsageError(f"{part.strip()!r} runs backwards. Type {last}-{first}.")
        layers |= set(range(first, last + 1))
    return tuple(sorted(layers))


def number_list(
    text: str, kind: Callable[[str], Number], what: str, example: str
) -> tuple[Number, ...]:
    """`0.1,0.2` as (0.1, 0.2), each read by `kind`. UsageError, which names what was expected."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is no list of {what}. Type e.g. {example}.") from None


def print_json(value: Any) -> None:
    """`value` as JSON on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_table(heads: list[str], rows: list[list[Any]]) -> None:
    """A plain table on stdout, numbers right-aligned; readable in a pipe."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads))]
    numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(heads))]

    def line(row: list[str]) -> str:
        parts = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    click.echo(line(heads))
    for row in cells:
        click.echo(line(row))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("%"))
    except ValueError:
        return text in ("", "-")
    return True
