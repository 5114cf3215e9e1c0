"""One job in hand: its row, what its cache holds, and how its tokens become events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxsteer.generation import PREFILL_STEP, owner_of, room
from mlxsteer.plan import PROMPT, Plan
from mlxsteer.prompting import first_phase
from mlxsteer.server.choosing import Choice
from mlxsteer.server.jobs import NO_TOKEN, Event, FinishReason, Generation
from mlxsteer.server.stops import Held
from mlxsteer.session import Stamped

if TYPE_CHECKING:
    from mlxsteer.model import Model


@dataclass(frozen=True)
class Measured:
    """What was read where a token was computed (see `Event`)."""

    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    readings: tuple[float, ...] = ()


class Answering:
    """A row of the engine. Everything here runs on the engine's thread.

    tokens: prompt and answer. cached: what the row's cache holds, each token with the stamp of
    what was done at its position. spans: [(first position, the plan from there on)].
    """

    def __init__(self, model: Model, generation: Generation):
        job = generation.job
        self.model = model
        self.generation = generation
        self.tokens = list(job.prompt)
        self.cached: list[Stamped] = []
        self.spans: list[tuple[int, Plan]] = []
        self.row = self.fresh_row()
        self.choice = Choice(job)
        self.limit = room(model, len(job.prompt), job.sampling.max_tokens)
        self._ends = set(model.tokenizer.eos_token_ids)
        self._detokenizer = model.tokenizer.detokenizer
        self._held = Held(job.stop)
        self._follower = replace(self.row, seen=self.row.prompt_length, phase=self.row.first)
        self._steer = ""

    def fresh_row(self) -> Any:
        """The row as it is before its first token."""
        prompt = self.generation.job.prompt
        return self.model.row(self.generation.plan, len(prompt), first_phase(self.model, prompt))

    @property
    def done(self) -> bool:
        return self.generation.state == "done"

    @property
    def failed(self) -> bool:
        return self.generation.finish_reason == "error"

    @property
    def written(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - self.generation.prompt_tokens

    # --- what a forward pass does ------------------------------------------------------------

    def govern(self, plan: Plan) -> None:
        """Positions from the next one on are under `plan`."""
        if not self.spans or self.spans[-1][1] is not plan:
            self.spans.append((len(self.cached), plan))
            self._steer = str(plan)
        self.row.control.plan = plan

    def begin(self) -> None:
        """The next token is now being computed, under the steering that is set at this moment."""
        self.govern(self.generation.begin(self.written))

    def note_prompt(self, count: int) -> None:
        """The cache now holds `count` more tokens of the prompt."""
        stamp = self.spans[-1][1].stamp(PROMPT)
        start = len(self.cached)
        self.cached += [(token, stamp) for token in self.tokens[start : start + count]]
        self.generation.prefilled = len(self.cached)

    def note_last(self) -> None:
        """The cache now holds the last token too."""
        plan, row = self.spans[-1][1], self.row
        first = len(self.cached) == row.prompt_length - 1
        phase = PROMPT | row.first if first else row.phase or row.first
        self.cached.append((self.tokens[-1], plan.stamp(phase)))
        self.generation.prefilled = row.prompt_length

    def rebuilt_cache(self) -> list[Any]:
        """What the cache held before the last token, computed anew."""
        self.row = self.fresh_row()
        cache = self.model.steered.new_cache(self.row)
        known = len(self.tokens) - 1
        del self.cached[known:]
        # A prefix from the cache was filled as the first plan would have filled it.
        starts = [0, *(min(start, known) for start, _ in self.spans[1:])]
        for (_, plan), start, end in zip(self.spans, starts, [*starts[1:], known], strict=True):
            self.row.control.plan = plan
            run(self.model, cache, self.tokens[start:end])
        return cache

    # --- what comes out ------------------------------------------------------------------------

    def take(self, token: int, measured: Measured) -> None:
        """Write the row's next token; ends the answer at an end token, a stop text, the limit."""
        if token in self._ends:
            self.close("stop")
            return
        self.tokens.append(token)
        self.choice.note(token)
        before, phase = self._follower.phase, self._follower.phases(1, [token])[0]
        self._detokenizer.add_token(token)
        event = Event(
            self._detokenizer.last_segment,
            token,
            owner_of(before, phase),
            logprob=measured.logprob,
            top=measured.top,
            steer=self._steer,
            readings=measured.readings,
        )
        events, stop = self._held.add(event)
        for event in events:
            self.generation.put(event)
        if stop is not None:
            self._put_close(Event("", NO_TOKEN, phase, "stop", stop_sequence=stop))
        elif self.written >= self.limit:
            self.close("length")

    def close(self, reason: FinishReason) -> None:
        """End the answer with what text is left."""
        self._detokenizer.finalize()
        phase = self._follower.phase
        events, stop = self._held.add(Event(self._detokenizer.last_segment, NO_TOKEN, phase))
        *events, last = [*events, *self._held.rest()]
        for event in events:
            self.generation.put(event)
        reason = "stop" if stop is not None else reason
        self._put_close(replace(last, finish_reason=reason, stop_sequence=stop))

    def fail(self, error: str) -> None:
        """End the answer with an error."""
        for event in self._held.rest():
            self.generation.put(event)
        self._put_close(Event("", phase=self._follower.phase, finish_reason="error", error=error))

    def _put_close(self, event: Event) -> None:
        self.generation.put(replace(event, steer=self._steer))


def run(model: Model, cache: list[Any], tokens: Sequence[int]) -> None:
    """Fill `cache` with `tokens`, in steps; their logits are not computed."""
    for start in range(0, len(tokens), PREFILL_STEP):
        model.steered(mx.array([list(tokens[start : start + PREFILL_STEP])]), cache)
        mx.eval([entry.state for entry in cache])
        mx.clear_cache()
