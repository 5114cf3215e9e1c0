"""Tokens out of a steered model: one answer streamed, or many rows in one batch.

The loops, samplers and detokenizers are mlx-lm's; this module feeds them rows and reads pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlxsteer import batch
from mlxsteer.errors import UsageError, near_matches
from mlxsteer.meter import MeteredModel
from mlxsteer.plan import THINK, TOOL, Plan
from mlxsteer.prompting import first_phase, within_context
from mlxsteer.rows import Row

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.probe import Probe

PREFILL_STEP = batch.PREFILL_STEP
PENALTY_WINDOW = 20  # tokens that a repetition penalty looks back on
MAX_BATCH_ROWS = 128


Processor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temp 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    repetition_penalty: above 1 makes tokens of the last 20 less likely.
    """

    max_tokens: int = 512
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, "max_tokens must be at least 1"),
            (self.temp >= 0, "temp must be 0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (self.top_k >= 0, "top_k must be 0 (off) or more"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (
                self.repetition_penalty is None or self.repetition_penalty > 0,
                "repetition_penalty must be above 0",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise UsageError(f"{message}.")

    def sampler(self) -> Callable[[mx.array], mx.array]:
        top_p = self.top_p if self.top_p < 1 else 0.0  # mlx-lm's word for off
        return make_sampler(self.temp, top_p=top_p, min_p=self.min_p, top_k=self.top_k)

    def processors(self) -> list[Processor]:
        return make_logits_processors(
            repetition_penalty=self.repetition_penalty, repetition_context_size=PENALTY_WINDOW
        )


@dataclass(frozen=True)
class Piece:
    """One token of an answer. phase: what it belongs to (plan.THINK, ANSWER or TOOL).

    readings: of the probes, where some are given, in the state that the token was chosen from;
    the piece that ends an answer has none.
    """

    text: str
    token: int
    phase: int
    finish_reason: str | None = None
    readings: tuple[float, ...] = ()

    @property
    def thinking(self) -> bool:
        return self.phase == THINK


@dataclass(frozen=True)
class Answer:
    """One row of a batch: tokens without the end token, text, and `stop` or `length`."""

    tokens: list[int]
    text: str
    finish_reason: str

    @property
    def ended(self) -> bool:
        """Whether the model ended it by itself."""
        return self.finish_reason == "stop"


def sampling_of(sampling: Sampling | None, options: Mapping[str, Any]) -> Sampling:
    """`sampling` with `options` changed; UsageError names an option that does not exist."""
    known = [field.name for field in fields(Sampling)]
    for name in options:
        if name not in known:
            raise UsageError(
                f"Unknown option {name!r}.{near_matches(name, known)} Options: {', '.join(known)}."
            )
    return replace(sampling or Sampling(), **options)


def stream(
    model: Model,
    tokens: Sequence[int],
    plan: Plan,
    sampling: Sampling,
    *,
    cache: list[Any] | None = None,
    probes: Sequence[Probe] = (),
    on_prefill: Callable[[int, int], None] | None = None,
) -> Iterator[Piece]:
    """The pieces of an answer to the prompt `tokens`.

    cache: a cache of `model.steered` whose row has seen a first part of `tokens`; filled
    further, it then holds every token yielded. probes: what every piece shall carry readings of
    (see `meter.probes_of`). on_prefill(done, total): progress.
    """
    tokens = within_context(model, list(tokens))
    row = model.row(plan, len(tokens), first_phase(model, tokens))
    if cache is None:
        cache = model.steered.new_cache(row)
    else:
        row.seen = cache[-1].rows[0].seen
        cache[-1].rows[0] = row
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    metered = MeteredModel(model.steered, probes) if probes else None
    steps = generate_step(
        mx.array(tokens[row.seen :]),
        cast(Any, metered or model.steered),
        max_tokens=room(model, len(tokens), sampling.max_tokens),
        sampler=sampling.sampler(),
        logits_processors=_seeing(tokens[: row.seen], sampling.processors()),
        prompt_cache=cache,
        prefill_step_size=PREFILL_STEP,
        prompt_progress_callback=on_prefill,
    )
    for index, piece in enumerate(_pieces(model, steps, row)):
        if metered is None or piece.finish_reason is not None:
            yield piece
        else:
            yield replace(piece, readings=metered.take(len(tokens) - 1 + index))


def _seeing(cached: Sequence[int], processors: Sequence[Processor]) -> list[Processor]:
    """Processors that also see the `cached` tokens: mlx-lm shows them only what it runs."""
    if not cached:
        return list(processors)
    before = mx.array(list(cached[-PENALTY_WINDOW:]))

    def seeing(process: Processor) -> Processor:
        return lambda tokens, logits: process(mx.concatenate([before, tokens]), logits)

    return [seeing(process) for process in processors]


def _pieces(model: Model, steps: Iterator[Any], row: Row) -> Iterator[Piece]:
    """Text and phases of the tokens that `steps` yields; ends at the end token."""
    detokenizer = model.tokenizer.detokenizer
    ends = set(model.tokenizer.eos_token_ids)
    phase = row.first
    follower = replace(row, seen=row.prompt_length, phase=row.first, recent=())
    for token, _ in steps:
        if token in ends:
            detokenizer.finalize()
            yield Piece(detokenizer.last_segment, token, phase, "stop")
            return
        detokenizer.add_token(token)
        before, phase = phase, follower.phases(1, [token])[0]
        yield Piece(detokenizer.last_segment, token, owner_of(before, phase))
    detokenizer.finalize()
    yield Piece(detokenizer.last_segment, -1, phase, "length")


def owner_of(before: int, phase: int) -> int:
    """The phase of a token between two: a marker belongs to what it closes or opens."""
    return THINK if THINK in (before, phase) else TOOL if TOOL in (before, phase) else phase


def generate_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    plans: Sequence[Plan],
    sampling: Sampling,
    *,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answers to `prompts`, row i under `plans[i]`, decoded together.

    on_tokens(n): called after each step, with the number of rows that it finished. Raises
    ContextLengthError.
    """
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    checked = [within_context(model, list(prompt)) for prompt in prompts]
    rows = [
        model.row(plan, len(prompt), first_phase(model, prompt))
        for prompt, plan in zip(checked, plans, strict=True)
    ]
    if rows and not batch.can_batch(model.steered, rows[0]):
        return _one_by_one(model, checked, plans, sampling, on_tokens)
    limits = [room(model, len(prompt), sampling.max_tokens) for prompt in checked]
    ends = set(model.tokenizer.eos_token_ids)
    found: list[batch.Decoded] = []
    for start in range(0, len(rows), MAX_BATCH_ROWS):
        part = slice(start, start + MAX_BATCH_ROWS)
        found += batch.decode(
            model.steered, checked[part], rows[part], limits[part], ends, sampling, on_tokens
        )
    return [_answer(model, row.tokens, row.finish_reason) for row in found]


def _one_by_one(
    model: Model,
    prompts: Sequence[Sequence[int]],
    plans: Sequence[Plan],
    sampling: Sampling,
    on_tokens: Callable[[int], None] | None,
) -> list[Answer]:
    """For models whose caches cannot hold several rows."""
    answers = []
    for prompt, plan in zip(prompts, plans, strict=True):
        pieces = list(stream(model, prompt, plan, replace(sampling, seed=None)))
        reason = pieces[-1].finish_reason or "length"
        tokens = [piece.token for piece in pieces[:-1]]
        answers.append(_answer(model, tokens, reason))
        if on_tokens:
            on_tokens(1)
    return answers


def _answer(model: Model, tokens: list[int], reason: str) -> Answer:
    return Answer(tokens, model.tokenizer.decode(tokens).strip(), reason)


def room(model: Model, prompt_length: int, max_tokens: int) -> int:
    """Tokens that still fit in the context, at most `max_tokens`."""
    limit = model.context_length
    return max_tokens if limit is None else max(1, min(max_tokens, limit - prompt_length))
