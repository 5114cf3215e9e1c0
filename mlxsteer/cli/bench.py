"""`mlxsteer bench`: costs that can be counted on any machine."""

from __future__ import annotations

from typing import Any

import click

from mlxsteer.cli.options import json_option, print_json, print_table


@click.group("bench")
def command() -> None:
    """Count what DeepSeek-V4-Flash costs per decoded token.

    \b
    Example:
      mlxsteer bench graph
    """


@command.command("graph")
@click.option("--no-rounding", is_flag=True, help="Without the activation rounding of training.")
@json_option
def graph(no_rounding: bool, as_json: bool) -> None:
    """Launches per decoded token, from the graph, and bytes read per recipe.

    The graph is that of the real 43-layer layout at tiny widths, in the regime where attention
    chooses rows. Views are left out; a custom kernel or a compiled group counts one. An estimate
    of what a GPU is asked to do, not a measurement of speed.

    \b
    Example:
      mlxsteer bench graph
    """
    from mlxsteer.convert.tables import recipe_sizes
    from mlxsteer.models.deepseek_v4.launches import VIEWS, decode_launches, launches, mean_launches

    steps = decode_launches(rounding=not no_rounding)
    reads = {name: facts.read_per_token for name, facts in recipe_sizes().items()}
    if as_json:
        primitives = {label: dict(counts) for label, counts in steps.items()}
        totals = {label: launches(counts) for label, counts in steps.items()}
        print_json({"launches": totals, "mean_launches": mean_launches(steps),
                    "primitives": primitives, "bytes_read_per_token": reads})  # fmt: skip
        return
    names = {name for counts in steps.values() for name in counts} - VIEWS
    busiest = sorted(names, key=lambda name: -max(counts[name] for counts in steps.values()))
    rows: list[list[Any]] = [
        [name, *(counts[name] for counts in steps.values())] for name in busiest
    ]
    rows.append(["estimated launches", *(launches(counts) for counts in steps.values())])
    print_table(["primitive", *steps], rows)
    click.echo(f"launches per token over a long answer: {mean_launches(steps):,.0f}\n")
    print_table(["recipe", "GB read per token"], [[n, f"{b / 1e9:.2f}"] for n, b in reads.items()])
