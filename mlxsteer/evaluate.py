"""Measures whether a vector does what its name says: runs the arms, leaves judging to `verdict`.

Held-out questions that calibration did not see, greedy answers, everything paired by question.
Answers are kept, so a measurement that was interrupted, or differs in a part, goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsteer import damage, metrics, statistics, trials
from mlxsteer.answers import AnswerStore, Kept, model_store
from mlxsteer.calibrate import QUESTIONS as CALIBRATION_QUESTIONS
from mlxsteer.contrast import ContrastSet, available
from mlxsteer.controls import random_like
from mlxsteer.divergence import steered_kl
from mlxsteer.errors import UsageError
from mlxsteer.generation import Sampling
from mlxsteer.judge import Judge, win_rate
from mlxsteer.plan import Plan
from mlxsteer.statistics import Interval
from mlxsteer.trials import Answering, Request
from mlxsteer.vector import SteeringVector
from mlxsteer.verdict import Check, Measured, checks, sentence, verdict

if TYPE_CHECKING:
    from mlxsteer.model import Model

STRENGTHS = (-5.0, -3.0, -1.0, 1.0, 3.0, 5.0)
SHARES = (-1.0, -0.5, 0.5, 1.0)  # of a projection, whose strength is the share removed
JUDGED = (3.0, 5.0)  # judged at the first, or at the second where the first does too little
JUDGED_SHARE = (1.0,)


@dataclass(frozen=True)
class Options:
    """How much is measured.

    questions: held-out ones, at most. random: directions that mean nothing, each answering the
    first `random_questions`. strength: judge at this one alone. KL is taken over the first
    `random_questions` as well.
    """

    questions: int = 24
    random: int = 20
    random_questions: int = 12
    max_tokens: int = 100
    strength: float | None = None
    seed: int | None = None
    temp: float = 0.0

    def __post_init__(self) -> None:
        if self.questions < 2 or self.max_tokens < 8:
            raise UsageError("An evaluation needs at least 2 questions and 8 tokens an answer.")
        if self.random < 0 or self.random_questions < 2:
            raise UsageError("Random directions: 0 (none) or more, on at least 2 questions.")
        if self.strength is not None and self.strength <= 0:
            raise UsageError(
                "Judge at a strength above 0; the reverse is measured beside it. For the opposite"
                " trait, evaluate the negated vector: mlxsteer vectors combine."
            )


@dataclass(frozen=True)
class Evaluation:
    """What was found. `rows`: the dose table; `measured`: the figures behind `checks`."""

    name: str
    metric: str
    direction: str
    n_questions: int
    measured: Measured
    checks: tuple[Check, ...]
    rows: tuple[dict[str, Any], ...]
    random_effects: tuple[float, ...]
    options: Options

    @property
    def verdict(self) -> str:
        return verdict(self.checks)

    @property
    def sentence(self) -> str:
        return sentence(self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as stored under `eval` in a vector's file."""
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "strength": self.measured.strength,
            "metric": self.metric,
            "direction": self.direction,
            "n_questions": self.n_questions,
            "measured": _plain(asdict(self.measured)),
            "checks": [asdict(check) for check in self.checks],
            "rows": list(self.rows),
            "random_effects": [round(effect, 4) for effect in self.random_effects],
            "options": asdict(self.options),
        }


def evaluate(
    model: Model,
    vector: SteeringVector,
    *,
    contrast: ContrastSet | None = None,
    show_progress: bool = True,
    store: AnswerStore | None = None,
    judge: Judge | None = None,
    force: bool = False,
    **options: Any,
) -> Evaluation:
    """The evaluation of `vector` on `model`; `options` are the fields of `Options`.

    contrast: whose metric, held-out questions and instruction are used; by default those of the
    set that the vector came from. store: where answers are kept (default: the cache folder).
    judge: says which of two answers shows more of the trait, beside the metric. force: also a
    vector of another architecture.
    Raises UsageError when nothing says what the vector should change.
    """
    contrast = contrast or set_of(vector)
    chosen = Options(**options)
    kept = store if store is not None else model_store(model)
    sampling = Sampling(max_tokens=chosen.max_tokens, temp=chosen.temp, seed=chosen.seed)
    answers = Answering(model, sampling, vector.name, kept, show_progress)
    return _Run(model, vector, contrast, chosen, answers, judge, force).evaluation()


def set_of(vector: SteeringVector) -> ContrastSet:
    """The contrast set that says what the vector should change."""
    name = vector.about.get("contrast_set")
    if name in available():
        return ContrastSet.load(name)
    raise UsageError(
        f"{vector.name!r} names no contrast set that is here, so what it should change is unknown."
        " Say whose metric and questions to use: --set terse, or --set FILE.yaml."
    )


def with_evaluation(vector: SteeringVector, found: Evaluation) -> SteeringVector:
    """`vector` with the evaluation in its file."""
    return replace(vector, about={**vector.about, "eval": found.to_dict()})


def questions_of(contrast: ContrastSet, count: int) -> tuple[str, ...]:
    """Held-out questions that calibration does not use, or all where too few are left."""
    unseen = contrast.held_out[CALIBRATION_QUESTIONS:]
    return (unseen if len(unseen) >= CALIBRATION_QUESTIONS else contrast.held_out)[:count]


@dataclass(frozen=True)
class _Run:
    """One evaluation under way."""

    model: Model
    vector: SteeringVector
    contrast: ContrastSet
    options: Options
    answers: Answering
    judge: Judge | None = None
    force: bool = False

    def evaluation(self) -> Evaluation:
        doses = self._doses()
        strength = self._judged(doses)
        asking, both = self._asked(strength)
        randoms = self._random_effects(strength)
        measured = self._measured(strength, doses, asking, both, randoms)
        return Evaluation(
            name=self.vector.name,
            metric=self.contrast.metric.label or self.contrast.metric.name,
            direction=self.contrast.metric.direction,
            n_questions=len(self.questions),
            measured=measured,
            checks=tuple(checks(measured)),
            rows=tuple(self._rows(doses, asking, both)),
            random_effects=tuple(randoms),
            options=self.options,
        )

    # --- arms ----------------------------------------------------------------------------

    @cached_property
    def questions(self) -> tuple[str, ...]:
        return questions_of(self.contrast, self.options.questions)

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [self.model.render(question) for question in self.questions]

    def _plan(self, strength: float, vector: SteeringVector | None = None) -> Plan:
        return self.model.plan((vector or self.vector, strength), force=self.force)

    def _doses(self) -> dict[float, list[Kept]]:
        """Answers at every strength, 0 among them."""
        usual = SHARES if self.vector.op == "project" else STRENGTHS
        own = self.options.strength
        strengths = sorted({0.0, *usual, *((own, -own) if own else ())})
        requests = [
            Request(prompt, self._plan(s), {"question": q, "amount": s, "steer": self.vector.name})
            for s in strengths
            for q, prompt in zip(self.questions, self.prompts, strict=True)
        ]
        found = self.answers(requests, "doses")
        n = len(self.questions)
        return {s: found[i * n : (i + 1) * n] for i, s in enumerate(strengths)}

    def _judged(self, doses: dict[float, list[Kept]]) -> float:
        if self.options.strength is not None:
            return self.options.strength
        usual = JUDGED_SHARE if self.vector.op == "project" else JUDGED
        plain = doses[0.0]
        for strength in usual:
            if statistics.mean_interval(self._effects(doses[strength], plain)).low > 0:
                return strength
        return usual[0]

    def _asked(self, strength: float) -> tuple[list[Kept] | None, list[Kept] | None]:
        """Answers to the instruction in the prompt, alone and together with the vector."""
        asked = [self.contrast.asking(q, i) for i, q in enumerate(self.questions)]
        prompts = [self.model.render(messages) for messages in asked if messages is not None]
        if not prompts:
            return None, None
        plans = (Plan([]), self._plan(strength))
        requests = [Request(prompt, plan, {"asked": True}) for plan in plans for prompt in prompts]
        found = self.answers(requests, "asking")
        return found[: len(prompts)], found[len(prompts) :]

    def _random_effects(self, strength: float) -> list[float]:
        """The mean effect of each random direction, at the same strength."""
        count = min(self.options.random_questions, len(self.questions))
        prompts = self.prompts[:count]
        requests = [Request(prompt, Plan([])) for prompt in prompts]
        for seed in range(self.options.random):
            plan = self._plan(strength, random_like(self.vector, seed))
            requests += [Request(prompt, plan, {"random": seed}) for prompt in prompts]
        found = self.answers(requests, "random directions", scored=False)
        groups = [found[i : i + count] for i in range(0, len(found), count)]
        return [statistics.mean_known(self._effects(group, groups[0])) for group in groups[1:]]

    # --- figures -------------------------------------------------------------------------

    def _values(self, answers: Sequence[Kept]) -> np.ndarray:
        texts = [answer.text for answer in answers]
        sign = 1.0 if self.contrast.metric.direction == "up" else -1.0
        ended = [answer.ended for answer in answers]
        return sign * np.asarray(metrics.measure(self.contrast.metric, texts, ended), np.float64)

    def _effects(self, answers: Sequence[Kept], plain: Sequence[Kept]) -> np.ndarray:
        return self._values(answers) - self._values(plain)

    def _interval(self, answers: Sequence[Kept] | None, plain: Sequence[Kept]) -> Interval | None:
        if answers is None:
            return None
        return statistics.mean_interval(self._effects(answers, plain))

    def _measured(
        self,
        strength: float,
        doses: dict[float, list[Kept]],
        asking: list[Kept] | None,
        both: list[Kept] | None,
        randoms: Sequence[float],
    ) -> Measured:
        plain, steered = doses[0.0], doses[strength]
        effects = self._effects(steered, plain)
        means = {s: statistics.mean_known(self._values(answers)) for s, answers in doses.items()}
        shared = self._shared_effect(steered, plain)
        plan = self._plan(strength)
        return Measured(
            strength=strength,
            effect=statistics.mean_interval(effects),
            wrong_way=statistics.mean_known(np.where(np.isnan(effects), np.nan, effects < 0)),
            slope=statistics.slope(list(means), list(means.values())),
            spearman=statistics.spearman(list(means), list(means.values())),
            percentile=statistics.share_below(shared, randoms) if randoms else None,
            n_random=len(randoms),
            reverse=self._interval(doses.get(-strength), plain),
            asking=self._interval(asking, plain),
            both=self._interval(both, plain),
            over_asking=self._interval(steered, asking) if asking else None,
            both_over_asking=self._interval(both, asking) if asking else None,
            damage=damage.neutral_log_likelihood(self.model, Plan([]))
            - damage.neutral_log_likelihood(self.model, plan),
            cloze_drop=damage.cloze_accuracy(self.model, Plan([]))
            - damage.cloze_accuracy(self.model, plan),
            **self._judged_by(steered, plain),
            **self._coherence(steered, plain, plan),
        )

    def _judged_by(self, steered: Sequence[Kept], plain: Sequence[Kept]) -> dict[str, Any]:
        """Whether the judge, blind to the arm and asked in both orders, sees more of the trait."""
        if self.judge is None:
            return {}
        found = win_rate(
            self.judge,
            self.questions,
            [answer.text for answer in steered],
            [answer.text for answer in plain],
            self.contrast.description,
        )
        preferred = statistics.mean_interval(found.preferences)
        return {"judge": preferred, "judge_bias": found.position_bias}

    def _shared_effect(self, steered: Sequence[Kept], plain: Sequence[Kept]) -> float:
        """The vector's mean effect on the questions that the random directions answered."""
        count = self.options.random_questions
        return statistics.mean_known(self._effects(steered[:count], plain[:count]))

    def _coherence(
        self, steered: Sequence[Kept], plain: Sequence[Kept], plan: Plan
    ) -> dict[str, Any]:
        one, other = (trials.arm_of(0, kept, self.contrast.metric) for kept in (steered, plain))
        count = self.options.random_questions
        tokens = [kept.tokens for kept in steered[:count]]
        shifts = np.concatenate(steered_kl(self.model, self.prompts[:count], tokens, plan))
        return {
            "perplexity_ratio": one.perplexity / other.perplexity,
            "distinct2_ratio": one.distinct2 / other.distinct2,
            "longest_repeat": _mean_repeat(steered) - _mean_repeat(plain),
            "kl95": float(np.quantile(shifts, 0.95)) if len(shifts) else float("nan"),
        }

    def _rows(
        self, doses: dict[float, list[Kept]], asking: list[Kept] | None, both: list[Kept] | None
    ) -> list[dict[str, Any]]:
        arms: list[tuple[str, list[Kept] | None]] = [
            (f"{strength:+g}" if strength else "0", answers) for strength, answers in doses.items()
        ]
        arms += [("asking", asking), ("both", both)]
        rows = []
        for name, answers in arms:
            if answers is not None:
                row: dict[str, Any] = trials.arm_of(0, answers, self.contrast.metric).row()
                rows.append({**row, "amount": name})
        return rows


def _mean_repeat(answers: Sequence[Kept]) -> float:
    return float(np.mean([metrics.longest_repeat(answer.text) for answer in answers]))


def _plain(value: Any) -> Any:
    """Numbers rounded to what they are worth; no NaN, which strict JSON lacks."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return round(value, 4) if np.isfinite(value) else None
    return value
