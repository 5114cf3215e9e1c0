"""Makes the vectors that ship for the demo model, and keeps those that work.

For each contrast set: extract, calibrate on the first held-out questions, then answer the other
held-out questions at every strength, greedily, 120 tokens at most. A vector is written to
`vectors/demo/` only when it passes the checks of `verdict`; its dose table is stored in it.
Prints each table; `--table` prints those of the shipped vectors without making anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import mlxsteer
from mlxsteer import trials
from mlxsteer.calibrate import QUESTIONS as CALIBRATION_QUESTIONS
from mlxsteer.calibrate import Guard, calibrate
from mlxsteer.cli.options import print_table
from mlxsteer.contrast import ContrastSet, available
from mlxsteer.model import Model
from mlxsteer.trials import Arm
from mlxsteer.vector import SteeringVector

FOLDER = Path(__file__).parent.parent / "vectors" / "demo"
STRENGTHS = (-3, -1, 0, 1, 3, 5)
QUESTIONS = 24
MAX_TOKENS = 120
# The demo model repeats itself in French under any steering, so there the guard is wider, and the
# doses end before its answers shrink to nothing. What that costs is in the dose table.
SETTINGS: dict[str, dict[str, Any]] = {
    "french": {
        "guard": Guard(distinct2_ratio=0.25),
        "doses": (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4),
    },
}
HEADS = ("amount", "metric", "words", "ended", "distinct2", "perplexity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="contrast sets (default: all)")
    parser.add_argument("--table", action="store_true", help="measure shipped vectors anew")
    parser.add_argument("--stored", action="store_true", help="print the stored dose tables")
    parser.add_argument("--strengths", help="instead of the usual ones, e.g. 0,5,6")
    parser.add_argument("--keep-failing", action="store_true", help="write those that fail, too")
    arguments = parser.parse_args()
    shipped = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
    if arguments.stored:
        for name in arguments.names or shipped:
            show_stored(SteeringVector.load(FOLDER / f"{name}.safetensors"))
        return
    strengths = STRENGTHS
    if arguments.strengths:
        strengths = tuple(float(part) for part in arguments.strengths.split(","))
    model = mlxsteer.load("demo")
    for name in arguments.names or (shipped if arguments.table else available()):
        if arguments.table:
            vector = SteeringVector.load(FOLDER / f"{name}.safetensors")
            show(vector, dose_table(model, vector, strengths))
        else:
            ship(model, name, keep_failing=arguments.keep_failing)


def ship(model: Model, name: str, *, keep_failing: bool) -> None:
    """Make, measure and (when it works) write the vector of one contrast set."""
    vector = calibrate(model, model.extract(name), **SETTINGS.get(name, {}))
    arms = dose_table(model, vector)
    checks = verdict(vector, arms)
    show(vector, arms, checks)
    table = {
        "questions": QUESTIONS,
        "max_tokens": MAX_TOKENS,
        "decoding": "greedy",
        "metric": metric_of(vector).name,
        "rows": [arm.row() for arm in arms],
        "checks": checks,
    }
    vector = replace(vector, about={**vector.about, "dose_table": table})
    if all(checks.values()) or keep_failing:
        print("written to", vector.save(FOLDER / f"{name}.safetensors").relative_to(FOLDER.parent))


def dose_table(
    model: Model, vector: SteeringVector, strengths: Sequence[float] = STRENGTHS
) -> list[Arm]:
    """One Arm per strength, on questions that calibration did not see."""
    contrast = ContrastSet.load(vector.about["contrast_set"])
    asked = contrast.held_out[CALIBRATION_QUESTIONS : CALIBRATION_QUESTIONS + QUESTIONS]
    steerings = [(float(s), model.plan((vector, float(s)))) for s in strengths]
    return trials.run(
        model,
        asked,
        steerings,
        contrast.metric,
        max_tokens=MAX_TOKENS,
        label=f"Measuring {vector.name}",
    )


def verdict(vector: SteeringVector, arms: Sequence[Arm]) -> dict[str, bool]:
    """Whether more strength gives more of the name, clearly, at a coherent strength."""
    sign = 1.0 if metric_of(vector).direction == "up" else -1.0
    by_strength = {arm.amount: arm for arm in arms}
    unsteered, strongest = by_strength[0.0], by_strength[5.0]
    gains = sign * (np.array(strongest.per_answer) - np.array(unsteered.per_answer))
    low, _ = bootstrap(gains[np.isfinite(gains)])
    upward = [sign * by_strength[s].metric for s in (0.0, 1.0, 3.0, 5.0)]
    slack = 0.05 * abs(upward[-1] - upward[0])
    return {
        "effect_at_5_above_0": bool(low > 0),
        "monotone_0_to_5": all(b >= a - slack for a, b in pairwise(upward)),
        "coherent_at_3": by_strength[3.0].perplexity <= 3 * unsteered.perplexity
        and by_strength[3.0].distinct2 >= 0.6 * unsteered.distinct2,
    }


def bootstrap(values: np.ndarray, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean, resampling answers."""
    if not len(values):
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).choice(values, (rounds, len(values)))
    low, high = np.percentile(draws.mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def metric_of(vector: SteeringVector) -> Any:
    return ContrastSet.load(vector.about["contrast_set"]).metric


def show(
    vector: SteeringVector, arms: Sequence[Arm], checks: Mapping[str, bool] | None = None
) -> None:
    """The dose table, and one answer at strengths 0 and 3."""
    metric, calibration = metric_of(vector), vector.calibration
    limits = f"δ+ {vector.delta(1):g}, δ− {vector.delta(-1):g}" if calibration else "uncalibrated"
    print(f"\n{vector.name}: metric {metric.name} ({metric.direction} is more), {limits}")
    print_rows([arm.row() for arm in arms])
    for arm in arms:
        if arm.amount >= 0 and arm.amount != 1:
            print(f"  {arm.amount:+g}: {arm.answers[0][:150]!r}")
    if checks:
        print("  " + ", ".join(f"{name} {'yes' if ok else 'NO'}" for name, ok in checks.items()))


def show_stored(vector: SteeringVector) -> None:
    table = vector.about.get("dose_table") or {}
    print(f"\n{vector.name}: metric {table.get('metric')}, {table.get('questions')} questions")
    print_rows(table.get("rows", []))


def print_rows(rows: Sequence[Mapping[str, float]]) -> None:
    print_table(["strength", *HEADS[1:]], [[row[head] for head in HEADS] for row in rows])


if __name__ == "__main__":
    main()
