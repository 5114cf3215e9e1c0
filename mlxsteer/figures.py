"""Figures of a sweep, drawn by matplotlib (the `plot` extra): curves over doses, or a heat map."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from mlxsteer.errors import UsageError
from mlxsteer.files import atomic_path
from mlxsteer.sweep import Cell, Sweep

COLOUR, RANDOM, ASKING, BROKEN = "#0b6e4f", "#8a8a8a", "#b3541e", "#c23b3b"


def require() -> None:
    """UsageError, before any work, when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError(
            "Figures need matplotlib, which is not installed. Type: pip install 'mlxsteer[plot]'"
        ) from None


def save_png(sweep: Sweep, path: Path) -> Path:
    """The figure of `sweep` as a PNG file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(_rendered(sweep, "png"))
    return path


def svg(sweep: Sweep) -> str:
    """The figure of `sweep` as one <svg> element, text kept as text."""
    text = _rendered(sweep, "svg").decode("utf-8")
    return text[text.index("<svg") :]


def _rendered(sweep: Sweep, kind: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mlxsteer"}):
        many = len({cell.variant for cell in sweep.cells}) > 1
        figure = Figure(figsize=(9.5, 4.2 if not many else 4.6), layout="constrained")
        if not many:
            _curves(figure, sweep)
        elif sweep.over == "layers":
            _heat_map(figure, sweep)
        else:
            _many_curves(figure, sweep)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=130, metadata=metadata)
        return buffer.getvalue()


def _curves(figure: Any, sweep: Sweep) -> None:
    """Left: the metric against the dose. Right: coherence against the guard."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    cells = _with_unsteered(sweep)
    x = [amount for amount, *_ in cells]
    left.fill_between(
        x, [c[2] for c in cells], [c[3] for c in cells], color=COLOUR, alpha=0.18, linewidth=0
    )
    left.plot(x, [c[1] for c in cells], "o-", color=COLOUR, label=f"{sweep.name} (95% interval)")
    if sweep.band:
        at = sorted([*sweep.band, (0.0, *[sweep.plain.metric] * 3)])
        xs = [p[0] for p in at]
        left.fill_between(
            xs, [p[1] for p in at], [p[3] for p in at], color=RANDOM, alpha=0.25, linewidth=0,
            label="random directions, least to largest",
        )  # fmt: skip
    if sweep.asking is not None:
        left.axhline(sweep.asking.metric, color=ASKING, linestyle="--", label="asked in the prompt")
    left.axvline(0, color="#bbbbbb", linewidth=0.8)
    _broken(left, sweep)
    left.set_xlabel(_unit_name(sweep))
    left.set_ylabel(sweep.metric)
    left.legend(fontsize=8, frameon=False)
    _coherence(right, sweep)


def _coherence(axes: Any, sweep: Sweep) -> None:
    cells = sorted(sweep.cells, key=lambda cell: cell.amount)
    x = [cell.amount for cell in cells]
    perplexity = [cell.arm.perplexity / sweep.plain.perplexity for cell in cells]
    distinct = [cell.arm.distinct2 / sweep.plain.distinct2 for cell in cells]
    axes.plot(x, perplexity, "o-", color="#444444", label="perplexity, × unsteered")
    axes.axhline(sweep.guard.perplexity_ratio, color="#444444", linestyle=":", label="its guard")
    axes.plot(x, distinct, "s-", color="#7a5ea8", label="distinct-2, × unsteered")
    axes.axhline(sweep.guard.distinct2_ratio, color="#7a5ea8", linestyle=":", label="its guard")
    _log_scale(axes)
    axes.set_xlabel(_unit_name(sweep))
    axes.set_title("coherence", fontsize=10)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)


def _log_scale(axes: Any) -> None:
    """Ratios on a log scale, with ticks that read as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _broken(axes: Any, sweep: Sweep) -> None:
    """A cross on every cell that is not coherent."""
    broken = [cell for cell in sweep.cells if not cell.coherent]
    if broken:
        axes.plot(
            [cell.amount for cell in broken],
            [cell.arm.metric for cell in broken],
            "x",
            color=BROKEN,
            markersize=10,
            label="not coherent",
        )


def _many_curves(figure: Any, sweep: Sweep) -> None:
    """One line per variant: what it moves, and what that costs."""
    left, right = figure.subplots(1, 2)
    for variant in dict.fromkeys(cell.variant for cell in sweep.cells):
        cells = sorted(_cells_of(sweep, variant), key=lambda cell: cell.amount)
        x = [cell.amount for cell in cells]
        [line] = left.plot(x, [cell.effect.mean for cell in cells], "o-", label=variant)
        left.fill_between(
            x, [c.effect.low for c in cells], [c.effect.high for c in cells], alpha=0.12,
            color=line.get_color(), linewidth=0,
        )  # fmt: skip
        ratios = [cell.arm.perplexity / sweep.plain.perplexity for cell in cells]
        right.plot(x, ratios, "o-", color=line.get_color())
    left.axhline(0, color="#bbbbbb", linewidth=0.8)
    left.set_ylabel(f"effect on {sweep.metric} (more of the name is up)")
    right.axhline(sweep.guard.perplexity_ratio, color="#444444", linestyle=":", label="guard")
    _log_scale(right)
    right.set_ylabel("perplexity, × unsteered")
    for axes in (left, right):
        axes.set_xlabel(_unit_name(sweep))
        axes.legend(fontsize=8, frameon=False)


def _heat_map(figure: Any, sweep: Sweep) -> None:
    """Bands of layers against doses; colour is the effect, a cross is what broke."""
    axes = figure.subplots()
    bands = list(dict.fromkeys(cell.variant for cell in sweep.cells))
    amounts = sorted({cell.amount for cell in sweep.cells})
    grid = np.full((len(bands), len(amounts)), np.nan)
    for cell in sweep.cells:
        row, column = bands.index(cell.variant), amounts.index(cell.amount)
        grid[row, column] = cell.effect.mean
        if not cell.coherent:
            axes.text(column, row, "×", ha="center", va="center", color="black")
    limit = float(np.nanmax(np.abs(grid))) or 1.0
    image = axes.imshow(grid, aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit)
    axes.set_xticks(range(len(amounts)), [f"{amount:g}" for amount in amounts])
    axes.set_yticks(range(len(bands)), bands)
    axes.set_xlabel(_unit_name(sweep))
    axes.set_ylabel("layers")
    axes.set_title(f"{sweep.name}: effect on {sweep.metric}; × is not coherent", fontsize=10)
    figure.colorbar(image, ax=axes, label="effect, more of the name is up")


def _with_unsteered(sweep: Sweep) -> list[tuple[float, float, float, float]]:
    """(amount, mean, low, high) in order, the unsteered answers at 0."""
    points = [(c.amount, c.arm.metric, c.mean.low, c.mean.high) for c in sweep.cells]
    unsteered = sweep.plain.metric
    return sorted([*points, (0.0, unsteered, unsteered, unsteered)])


def _cells_of(sweep: Sweep, variant: str) -> list[Cell]:
    return [cell for cell in sweep.cells if cell.variant == variant]


def _unit_name(sweep: Sweep) -> str:
    units = {cell.unit for cell in sweep.cells}
    return "dose" if units == {"d"} else "strength" if units == {""} else "dose, or share removed"
