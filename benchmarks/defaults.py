"""Compares what the defaults chose between: methods, ops and layers, set by set, side by side.

For each set and each variant: the largest effect among the doses whose answers stay coherent, in
standard deviations of the unsteered answers' metric, with its 95% interval. Same questions, same
doses (in residual norms) for all. Answers are kept, so an interrupted comparison goes on.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import numpy as np

import mlxsteer
from mlxsteer.answers import model_store
from mlxsteer.cli.options import print_table
from mlxsteer.model import Model
from mlxsteer.sweep import Cell, Sweep, sweep

SETS = ("terse", "cheerful", "formal", "technical")
AXES = ("methods", "ops", "layers")
DOSES = (0.15, 0.3, 0.45)
PROTOCOL: dict[str, Any] = {"questions": 10, "max_tokens": 56, "random": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--over", default=",".join(AXES))
    parser.add_argument("--width", type=int, default=8, help="layers of a band")
    arguments = parser.parse_args()
    model = mlxsteer.load("demo")
    names = arguments.sets.split(",")
    for over in arguments.over.split(","):
        compare(model, names, over, arguments.width)


def compare(model: Model, names: list[str], over: str, width: int) -> None:
    """One table: variants down, sets across, and the mean over sets."""
    columns: dict[str, dict[str, tuple[float, str]]] = defaultdict(dict)
    for name in names:
        vector = model.extract(name)
        amounts = () if over == "ops" else DOSES  # a projection's are shares
        options = {**PROTOCOL, "over": over, "amounts": amounts}
        if over == "layers":
            options["width"] = width
        found = sweep(model, vector, store=model_store(model), **options)
        for variant in dict.fromkeys(cell.variant for cell in found.cells):
            columns[variant][name] = strongest(found, variant)
    print(f"\nover {over}: largest coherent effect, in standard deviations (95% interval, at)")
    rows = []
    for variant, by_set in columns.items():
        mean = float(np.mean([by_set[name][0] for name in names]))
        rows.append([variant, f"{mean:.2f}", *(by_set[name][1] for name in names)])
    print_table([over, "mean", *names], rows)


def strongest(found: Sweep, variant: str) -> tuple[float, str]:
    """(effect, its text) of the best coherent cell of positive amount; 0 where all broke."""
    cells = [c for c in found.cells if c.variant == variant and c.amount > 0 and c.coherent]
    if not cells:
        return 0.0, "broke"
    spread = float(np.nanstd(found.plain.per_answer)) or 1.0
    best: Cell = max(cells, key=lambda cell: cell.effect.mean)
    effect = best.effect
    text = f"{effect.mean / spread:.2f} [{effect.low / spread:.2f}, {effect.high / spread:.2f}]"
    return effect.mean / spread, f"{text} {best.amount:g}{best.unit}"


if __name__ == "__main__":
    main()
