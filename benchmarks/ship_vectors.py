"""Evaluates every bundled contrast set on the demo model, and ships the vectors that work.

For each set: extract, calibrate on the first held-out questions, evaluate on others (see
`mlxsteer evaluate`). A vector whose verdict is not "does not work" is written to `vectors/demo/`,
with its evaluation inside; every verdict, of failures too, goes to `docs/verdicts.json`.
`--table` writes `docs/library.md` from that file, without running anything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import mlxsteer
from mlxsteer.calibrate import Guard, calibrate
from mlxsteer.contrast import available
from mlxsteer.evaluate import Evaluation, evaluate, with_evaluation
from mlxsteer.files import write_text
from mlxsteer.model import Model
from mlxsteer.vector import SteeringVector
from mlxsteer.verdict import FAILS, NOT_BETTER, WORKS

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "vectors" / "demo"
VERDICTS = ROOT / "docs" / "verdicts.json"
LIBRARY = ROOT / "docs" / "library.md"
# A coarser grid than `calibrate`'s own: half the time.
CALIBRATION: dict[str, Any] = {"doses": (0.15, 0.25, 0.35, 0.5, 0.7, 1.0)}
PROTOCOL = {"questions": 12, "max_tokens": 64, "random": 20, "random_questions": 6}
# What differs from the defaults, and what a set was extracted with when it works better so.
SETTINGS: dict[str, dict[str, Any]] = {
    # The demo model repeats itself in French under any steering: the guard is wider, and the
    # doses end before its answers shrink to nothing.
    "french": {
        "calibrate": {
            "guard": Guard(distinct2_ratio=0.25),
            "doses": (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4),
        }
    },
    # At the default guard its strength 3 goes past what the verdict allows.
    "technical": {"calibrate": {"guard": Guard(perplexity_ratio=2.5)}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="contrast sets (default: all)")
    parser.add_argument(
        "--keep", action="store_true", help="evaluate the shipped files as they are"
    )
    parser.add_argument("--table", action="store_true", help="write docs/library.md")
    arguments = parser.parse_args()
    if arguments.table:
        write_text(LIBRARY, page(kept()))
        print("written to", LIBRARY.relative_to(ROOT))
        return
    model = mlxsteer.load("demo")
    for name in arguments.names or available():
        start = perf_counter()
        vector = None
        path = FOLDER / f"{name}.safetensors"
        if arguments.keep and path.exists():
            vector = SteeringVector.load(path)
        ship(model, name, vector or made(model, name))
        print(f"  {perf_counter() - start:.0f} s", flush=True)


def made(model: Model, name: str) -> SteeringVector:
    """The calibrated vector of a contrast set."""
    settings = SETTINGS.get(name, {})
    vector = model.extract(name, **settings.get("extract", {}))
    return calibrate(model, vector, **CALIBRATION | settings.get("calibrate", {}))


def ship(model: Model, name: str, vector: SteeringVector) -> None:
    """Evaluate; keep the verdict, and the vector if it works."""
    found = evaluate(model, vector, **PROTOCOL)
    show(found)
    write_text(VERDICTS, json.dumps(kept() | {name: summary(vector, found)}, indent=1) + "\n")
    path = FOLDER / f"{name}.safetensors"
    if found.verdict == FAILS:
        path.unlink(missing_ok=True)
    else:
        with_evaluation(vector, found).save(path)


def kept() -> dict[str, Any]:
    return json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}


def summary(vector: SteeringVector, found: Evaluation) -> dict[str, Any]:
    data = found.to_dict()
    return {
        **{key: data[key] for key in ("verdict", "sentence", "strength", "metric", "measured")},
        "failed": [check.name for check in found.checks if check.passed is False],
        "unsteered": next(row["metric"] for row in found.rows if row["amount"] == "0"),
        "delta": [vector.delta(1), vector.delta(-1)],
    }


def show(found: Evaluation) -> None:
    print(f"\n{found.name}: {found.sentence} (strength {found.measured.strength:g})")
    for check in found.checks:
        print(f"  {check.passed!s:5}  {check.name}: {check.found} (needed {check.needed})")
    for row in found.rows:
        print("  ", row)


PAGE = """# The library, measured

Every contrast set in `prompts/`, evaluated on the demo model (SmolLM2-135M-Instruct). Those that
work ship as vectors; those that do not are here as well, with what they failed. Written from
`docs/verdicts.json` by `python benchmarks/ship_vectors.py --table`; a run without flags makes that.

Protocol: extracted with the set's defaults and calibrated, then {questions} held-out questions that
calibration did not see, greedy answers of at most {max_tokens} tokens, judged at strength 3 (or at
5, where 3 does too little), against {random} random directions of the same lengths on
{random_questions} questions. Effects are paired differences from the unsteered answers with
bootstrap 95% intervals, turned so that more of the name is positive. `mlxsteer vectors show NAME`
prints every line of a verdict; the limits that it is judged by are in `mlxsteer/verdict.py`.

{works} of {total} sets work; {better} of them do more than asking for the trait in the prompt.
{missing}
"""
HEADS = (
    "vector", "verdict", "at", "metric", "unsteered", "effect", "asking", "beats random",
    "perplexity", "distinct-2", "not passed",
)  # fmt: skip


def page(verdicts: Mapping[str, Any]) -> str:
    """docs/library.md."""
    works = [data for data in verdicts.values() if data["verdict"] != FAILS]
    better = sum(data["verdict"] == WORKS for data in works)
    names = ", ".join(sorted(set(available()) - set(verdicts)))
    missing = f"Not evaluated yet: {names}.\n" if names else ""
    counts = {"works": len(works), "total": len(verdicts), "better": better, "missing": missing}
    order = {WORKS: 0, NOT_BETTER: 1, FAILS: 2}
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for name, data in sorted(
        verdicts.items(), key=lambda item: (order[item[1]["verdict"]], item[0])
    ):
        lines.append(f"| {' | '.join(row(name, data))} |")
    return PAGE.format(**PROTOCOL, **counts) + "\n".join(lines) + "\n"


def row(name: str, data: Mapping[str, Any]) -> list[str]:
    m = data["measured"]
    return [
        name,
        data["verdict"],
        f"{data['strength']:g}",
        data["metric"],
        f"{data['unsteered']:.3g}",
        interval(m["effect"]),
        interval(m["asking"]),
        f"{100 * m['percentile']:.0f}%",
        f"{m['perplexity_ratio']:.2g}x",
        f"{m['distinct2_ratio']:.2g}x",
        ", ".join(data["failed"]) or "-",
    ]


def interval(data: Mapping[str, float] | None) -> str:
    return "-" if data is None else f"{data['mean']:+.3g} [{data['low']:+.3g}, {data['high']:+.3g}]"


if __name__ == "__main__":
    main()
