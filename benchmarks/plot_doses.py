"""Draws the stored dose tables of the shipped vectors: docs/dose-response.png.

Needs the `plot` extra. Reads the files in `vectors/demo/`; runs no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxsteer.vector import SteeringVector

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "dose-response.png"
NAMES = {
    "words": "mean words an answer",
    "uppercase_share": "share of capitals",
    "language": "share in the language",
    "regex_share": "share of answers that name it",
    "contractions": "contractions per 100 words",
    "sentiment": "sentiment, −1 to 1",
}


def main() -> None:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        raise SystemExit("This needs matplotlib: pip install 'mlxsteer[plot]'") from None
    vectors = [SteeringVector.load(path) for path in sorted((ROOT / "vectors/demo").glob("*.s*"))]
    columns = 3
    figure, grid = plt.subplots(
        -(-len(vectors) // columns), columns, figsize=(11, 3 * -(-len(vectors) // columns))
    )
    for axes in grid.flat[len(vectors) :]:
        axes.axis("off")
    for axes, vector in zip(grid.flat, vectors, strict=False):
        draw(axes, vector)
    figure.suptitle("Shipped vectors on the demo model: 24 held-out questions, greedy, 120 tokens")
    figure.tight_layout()
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, dpi=110)
    print("written to", TARGET.relative_to(ROOT))


def draw(axes: Any, vector: SteeringVector) -> None:
    """The metric (left) and the perplexity ratio (right, grey) against strength."""
    table = vector.about["dose_table"]
    rows = table["rows"]
    plain = next(row for row in rows if row["amount"] == 0)
    strengths = [row["amount"] for row in rows]
    axes.plot(strengths, [row["metric"] for row in rows], "o-", color="#0b6e4f")
    axes.set_title(vector.name)
    axes.set_xlabel("strength")
    axes.set_ylabel(NAMES.get(table["metric"], table["metric"]), color="#0b6e4f")
    axes.axvline(0, color="#cccccc", linewidth=0.8)
    right = axes.twinx()
    ratios = [row["perplexity"] / plain["perplexity"] for row in rows]
    right.plot(strengths, ratios, "--", color="#888888", linewidth=1)
    right.set_ylabel("perplexity, × unsteered", color="#888888")
    right.set_ylim(0, max(5.0, *ratios))


if __name__ == "__main__":
    main()
