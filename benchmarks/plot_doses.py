"""Draws the evaluations stored in the shipped vectors: docs/dose-response.png.

Needs the `plot` extra. Reads the files in `vectors/demo/`; runs no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxsteer.vector import SteeringVector

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "dose-response.png"
COLUMNS = 4
METRIC, COST, ASKED = "#0b6e4f", "#888888", "#b3541e"


def main() -> None:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        raise SystemExit("This needs matplotlib: pip install 'mlxsteer[plot]'") from None
    vectors = [SteeringVector.load(path) for path in sorted((ROOT / "vectors/demo").glob("*.s*"))]
    lines = -(-len(vectors) // COLUMNS)
    figure, grid = plt.subplots(lines, COLUMNS, figsize=(13, 2.9 * lines), squeeze=False)
    for axes in grid.flat[len(vectors) :]:
        axes.axis("off")
    for axes, vector in zip(grid.flat, vectors, strict=False):
        draw(axes, vector)
    figure.suptitle(
        "Shipped vectors on the demo model: held-out questions, greedy. Green: the metric; dashed"
        " brown: asked in the prompt; dashed grey: perplexity, × unsteered",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(TARGET, dpi=100)
    print("written to", TARGET.relative_to(ROOT))


def draw(axes: Any, vector: SteeringVector) -> None:
    """The metric (left) and the perplexity ratio (right, grey) against strength."""
    found = vector.about["eval"]
    rows = {row["amount"]: row for row in found["rows"]}
    doses = sorted((float(amount), row) for amount, row in rows.items() if amount[-1].isdigit())
    strengths = [strength for strength, _ in doses]
    axes.plot(strengths, [row["metric"] for _, row in doses], "o-", color=METRIC)
    if "asking" in rows:
        axes.axhline(rows["asking"]["metric"], color=ASKED, linestyle="--", linewidth=1)
    axes.set_title(vector.name, fontsize=11)
    axes.set_ylabel(found["metric"], color=METRIC)
    axes.axvline(0, color="#cccccc", linewidth=0.8)
    right = axes.twinx()
    ratios = [row["perplexity"] / rows["0"]["perplexity"] for _, row in doses]
    right.plot(strengths, ratios, "--", color=COST, linewidth=1)
    right.set_ylim(0, max(5.0, *ratios))
    right.tick_params(colors=COST)


if __name__ == "__main__":
    main()
