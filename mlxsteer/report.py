"""A sweep as one HTML page that needs nothing beside it: figure, table, answers side by side."""

from __future__ import annotations

from html import escape
from pathlib import Path

from mlxsteer import figures
from mlxsteer.files import write_text
from mlxsteer.sweep import Cell, Sweep

SAMPLES = 4  # questions whose answers are shown

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #0b6e4f; --bad: #c23b3b; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
figure { margin: 1rem 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.broken td { opacity: .6; } .no { color: var(--bad); } tr.best td { font-weight: 600; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .8rem; }
.side > div { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.side h4 { margin: 0 0 .3rem; font-size: .85rem; opacity: .75; }
.side p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .93rem; }
"""


def save_html(sweep: Sweep, path: Path) -> Path:
    """Write the page, whole or not at all. Needs the `plot` extra."""
    write_text(path, page(sweep))
    return path


def page(sweep: Sweep) -> str:
    """The whole page; every text that a model or a user wrote is escaped."""
    title = f"{escape(sweep.name)}: sweep over {escape(sweep.over)}"
    more = "more" if sweep.direction == "up" else "less"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            f"<p>{len(sweep.questions)} held-out questions. Metric: {escape(sweep.metric)};"
            f" more of the name is {more} of it. {_best(sweep)}</p>",
            f"<figure>{figures.svg(sweep)}</figure>",
            f'<h2>Figures</h2><div class="scroll">{_table(sweep)}</div>',
            f"<h2>Answers side by side</h2>{_samples(sweep)}",
            "</body></html>",
        ]
    )


def _best(sweep: Sweep) -> str:
    best = sweep.best
    if best is None:
        return "No coherent setting has an effect that chance could not give."
    return f"Largest coherent effect: {escape(_label(best))} ({escape(str(best.effect))})."


def _label(cell: Cell) -> str:
    return f"{cell.variant}:{cell.amount:+g}{cell.unit}"


def _table(sweep: Sweep) -> str:
    heads = ["setting", sweep.metric, "95% interval", "effect", "length in words", "ended"]
    heads += ["distinct-2", "perplexity", "coherent"]
    rows = [_row("unsteered", sweep.plain.row(), "", "", True, "")]
    best = sweep.best
    for cell in sweep.cells:
        interval = f"{cell.mean.low:.3g} to {cell.mean.high:.3g}"
        css = "best" if cell is best else "" if cell.coherent else "broken"
        effect = str(cell.effect)
        rows.append(_row(_label(cell), cell.arm.row(), interval, effect, cell.coherent, css))
    if sweep.asking is not None:
        rows.append(_row("asked in the prompt", sweep.asking.row(), "", "", True, ""))
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(
    label: str,
    figures_of: dict[str, float | None],
    interval: str,
    effect: str,
    coherent: bool,
    css: str,
) -> str:
    def number(name: str) -> str:
        value = figures_of[name]
        return "–" if value is None else f"{value:.3g}"

    cells = [label, number("metric"), interval, effect]
    cells += [number(name) for name in ("words", "ended", "distinct2", "perplexity")]
    inside = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    mark = "<td>yes</td>" if coherent else '<td class="no">no</td>'
    return f'<tr class="{css}">{inside}{mark}</tr>'


def _samples(sweep: Sweep) -> str:
    """Unsteered, asked and steered answers of the first questions."""
    columns: list[tuple[str, tuple[str, ...]]] = [("unsteered", sweep.plain.answers)]
    if sweep.asking is not None:
        columns.append(("asked in the prompt", sweep.asking.answers))
    columns += [(_label(cell), cell.arm.answers) for cell in _shown(sweep)]
    parts = []
    for index, question in enumerate(sweep.questions[:SAMPLES]):
        boxes = "".join(
            f"<div><h4>{escape(name)}</h4><p>{escape(answers[index])}</p></div>"
            for name, answers in columns
        )
        parts.append(f'<h3>{escape(question)}</h3><div class="side">{boxes}</div>')
    return "\n".join(parts)


def _shown(sweep: Sweep) -> list[Cell]:
    """Every dose of a single vector; of many variants the best cell of each."""
    names = list(dict.fromkeys(cell.variant for cell in sweep.cells))
    if len(names) == 1:
        return sorted(sweep.cells, key=lambda cell: cell.amount)
    chosen = []
    for name in names:
        cells = [cell for cell in sweep.cells if cell.variant == name]
        own = [cell for cell in cells if cell.amount > 0] or cells
        own = [cell for cell in own if cell.coherent] or own
        chosen.append(max(own, key=lambda cell: cell.effect.mean))
    return chosen
