"""A conversation: its messages, its prompt cache, its steering, live.

A prompt cache belongs to the steering that filled it: every cached token carries the stamp of
what was done at its position, and a turn reuses only the rows that it would compute again. So a
cached chat gives the same answers as one rendered from the start. A failed turn leaves the chat
as it was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from mlxsteer import library
from mlxsteer.errors import MlxsteerError, UsageError
from mlxsteer.files import write_text
from mlxsteer.generation import PREFILL_STEP, Piece, Sampling, stream
from mlxsteer.meter import Meters, probes_of
from mlxsteer.plan import PROMPT, Plan, build
from mlxsteer.probe import Probe
from mlxsteer.prompting import Messages, Thinking, can_think, messages_of, render
from mlxsteer.rows import Row

if TYPE_CHECKING:
    from mlxsteer.model import Model, Steer
    from mlxsteer.vector import SteeringVector

OnPrefill = Callable[[int, int], None]

FORMAT_VERSION = 1

Stamped = tuple[int, str]  # a token, and the key of what was done at its position


@dataclass
class CachedPrefix:
    """A prompt cache and what its rows hold."""

    cache: list[Any]
    rows: list[Stamped] = field(default_factory=list)

    @property
    def trimmable(self) -> bool:
        return bool(can_trim_prompt_cache(self.cache[:-1]))

    def usable(self, wanted: Sequence[Stamped]) -> int:
        """How many leading rows are as wanted, and can be had without those that follow."""
        pairs = zip(self.rows, wanted, strict=False)
        shorter = min(len(self.rows), len(wanted))
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        return common if common == len(self.rows) or self.trimmable else 0

    def cut(self, length: int) -> CachedPrefix:
        """The first `length` rows, for going on from; a cache that cannot go back is copied."""
        if not self.trimmable:
            return CachedPrefix(copy.deepcopy(self.cache), list(self.rows))
        trim_prompt_cache(self.cache[:-1], len(self.rows) - length)
        self.cache[-1].rows[0].seen = length
        return CachedPrefix(self.cache, self.rows[:length])


@dataclass
class Turn:
    """What the last turn cost: prompt tokens, those found in the cache, tokens written.

    The end token is not counted.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    finish_reason: str = ""


class Session:
    """A chat with one model. `ask` streams an answer; `steer` changes what follows."""

    def __init__(
        self,
        model: Model,
        *,
        steer: Steer = None,
        system: str | None = None,
        thinking: Thinking = False,
        sampling: Sampling | None = None,
        force: bool = False,
        meters: Meters = (),
    ) -> None:
        self.model = model
        self.sampling = sampling or Sampling()
        self.thinking: Thinking = False
        self.think(thinking)
        self.force = force
        self.system = system
        self.messages: Messages = []
        self.last = Turn()
        self.plan = Plan([])
        self.probes: tuple[Probe, ...] = ()
        self._prefixes: list[CachedPrefix] = []
        self.steer(steer)
        self.meter(meters)

    # --- settings --------------------------------------------------------------------------

    def steer(self, steer: Steer) -> Plan:
        """Set the steering; also of an answer that is being written, from its next token on.

        (The next to be computed: one is always on its way when a piece is seen.)
        """
        self.plan = self.model.plan(steer, force=self.force)
        return self.plan

    def think(self, thinking: Thinking) -> None:
        """Let the model think before it answers, or not. UsageError when it cannot."""
        if not can_think(self.model, thinking):
            mode = "maximum effort" if thinking == "max" else "thinking mode"
            raise UsageError(f"{self.model.label} has no {mode}. Leave it off.")
        self.thinking = thinking

    def meter(self, meters: Meters) -> tuple[Probe, ...]:
        """What the pieces of the next answers carry readings of (see `meter.probes_of`).

        Nothing, `()`, switches it off.
        """
        self.probes = probes_of(self.model, meters) if meters else ()
        return self.probes

    def reset(self) -> None:
        """Forget the conversation; keep the settings."""
        self.messages = []
        self._prefixes = []

    # --- talking ---------------------------------------------------------------------------

    def ask(self, text: str, *, on_prefill: OnPrefill | None = None) -> Generator[Piece]:
        """The answer to `text`, piece by piece; kept with it when the turn ends.

        Closing the iterator early (or KeyboardInterrupt) keeps what was written so far. An error
        leaves the chat as it was. on_prefill(done, total): progress; it may raise.
        """
        asked = self._asked(text)
        written: list[Piece] = []
        try:
            for piece in self._answer(asked, lambda: self.plan, on_prefill):
                written.append(piece)
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            self._keep(asked, written, "interrupted")
            raise
        self._keep(asked, written, written[-1].finish_reason or "length")

    def ask_plain(self, text: str, *, on_prefill: OnPrefill | None = None) -> Generator[Piece]:
        """The answer that the unsteered model would give now. The chat stays as it is."""
        plain = Plan([])
        yield from self._answer(self._asked(text), lambda: plain, on_prefill)

    def _asked(self, text: str) -> Messages:
        return [*self.messages, {"role": "user", "content": text}]

    def _keep(self, asked: Messages, written: Sequence[Piece], reason: str) -> None:
        answer = "".join(piece.text for piece in written if not piece.thinking).strip()
        thought = "".join(piece.text for piece in written if piece.thinking).strip()
        self.last.answer_tokens = sum(piece.finish_reason is None for piece in written)
        self.last.finish_reason = reason
        if not written:
            return
        message: dict[str, Any] = {"role": "assistant", "content": answer}
        if thought:
            message["reasoning_content"] = self._unmarked(thought)
        self.messages = [*asked, message]

    def _unmarked(self, thought: str) -> str:
        tokenizer = self.model.tokenizer
        for marker in (tokenizer.think_start, tokenizer.think_end):
            thought = thought.replace(marker or "\0", "")
        return thought.strip()

    def _answer(
        self, asked: Messages, plan_now: Callable[[], Plan], on_prefill: OnPrefill | None
    ) -> Iterator[Piece]:
        tokens = render(self.model, self._with_system(asked), thinking=self.thinking)
        plan = plan_now()
        live = self._prefilled(tokens, plan, on_prefill)
        kept = [] if live.trimmable else [CachedPrefix(copy.deepcopy(live.cache), list(live.rows))]
        pieces = stream(
            self.model, tokens, plan, self.sampling, cache=live.cache, probes=self.probes
        )
        while True:
            self._prefixes = kept  # a pass that fails leaves `live` in pieces
            piece = next(pieces, None)
            if piece is None:
                break
            row = live.cache[-1].rows[0]
            _note(live, tokens, piece, plan, row)
            self._prefixes = [*kept, live]
            yield piece
            plan = row.control.plan = plan_now()
        self._prefixes = [*kept, live]

    def _with_system(self, messages: Messages) -> Messages:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return messages_of([*system, *messages])

    # --- the prompt cache --------------------------------------------------------------------

    def _prefilled(
        self, tokens: Sequence[int], plan: Plan, on_prefill: OnPrefill | None
    ) -> CachedPrefix:
        """A cache of the prompt up to its last token under `plan`, run in steps where needed."""
        stamp = plan.stamp(PROMPT)
        wanted = [(token, stamp) for token in tokens[:-1]]
        live = self._longest(wanted)
        self.last = Turn(prompt_tokens=len(tokens), cached_tokens=len(live.rows))
        row = live.cache[-1].rows[0]
        row.control.plan, row.prompt_length = plan, len(tokens)
        others = [] if live.trimmable else self._prefixes
        while len(live.rows) < len(wanted):
            self._prefixes = others
            step = wanted[len(live.rows) : len(live.rows) + PREFILL_STEP]
            self.model.steered(mx.array([[token for token, _ in step]]), live.cache)
            mx.eval([entry.state for entry in live.cache])
            live.rows += step
            self._prefixes = [*others, live]
            if on_prefill:
                on_prefill(len(live.rows), len(tokens))
        return live

    def _longest(self, wanted: Sequence[Stamped]) -> CachedPrefix:
        """The kept prefix that saves most, cut to what is wanted; a new one when none does."""
        best = max(self._prefixes, key=lambda prefix: prefix.usable(wanted), default=None)
        if best is None or not (length := best.usable(wanted)):
            return CachedPrefix(self.model.make_cache())
        return best.cut(length)

    # --- keeping -----------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the chat as JSON: messages, steering, settings.

        MlxsteerError when `path` holds something else, or when the steering is of arrays that no
        name leads to.
        """
        if Path(path).exists():
            read_chat(path)
        facts = {
            "format_version": FORMAT_VERSION,
            "model": self.model.label,
            "steer": self._steering_text(),
            "system": self.system,
            "thinking": self.thinking,
            "sampling": asdict(self.sampling),
            "messages": self.messages,
        }
        write_text(path, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")

    def _steering_text(self) -> str:
        """The steering in words that lead to the same arrays again."""

        def find(name: str) -> SteeringVector:
            return library.find(name, self.model.key)

        try:
            found = [(t.term, find(t.term.name)) for t in self.plan.terms]
            same = build(found, self.model.shape, force=True, find=find).key == self.plan.key
        except MlxsteerError:
            same = False
        if not same:
            raise MlxsteerError(
                f"The steering ({self.plan}) was given as arrays, which a chat's file cannot hold."
                " Save the vector under a name and steer by that, or switch the steering off."
            )
        return str(self.plan)

    def load(self, path: Path) -> list[str]:
        """Go on with a saved chat; returns warnings.

        MlxsteerError when the file is not one; nothing changes then.
        """
        facts = read_chat(path)
        try:
            sampling = Sampling(**facts["sampling"])
            messages = messages_of(facts["messages"]) if facts["messages"] else []
        except (TypeError, UsageError) as error:
            raise _not_a_chat(path, str(error)) from None
        self.plan = self.model.plan(facts["steer"], force=self.force)
        self.system = facts["system"]
        thinking = facts["thinking"]
        self.thinking = thinking if can_think(self.model, thinking) else False
        self.messages, self.sampling, self._prefixes = messages, sampling, []
        if facts["model"] == self.model.label:
            return list(self.plan.warnings)
        other = f"{path} was written with {facts['model']}; going on with {self.model.label}."
        return [other, *self.plan.warnings]


def _note(live: CachedPrefix, tokens: Sequence[int], piece: Piece, plan: Plan, row: Row) -> None:
    """Record that the cache holds `piece`, and before the first the last prompt token."""
    if len(live.rows) == len(tokens) - 1:
        live.rows.append((tokens[-1], plan.stamp(PROMPT | row.first)))
    if piece.token >= 0:
        live.rows.append((piece.token, plan.stamp(row.phase or row.first)))


_KINDS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "steer": str,
    "system": (str, type(None)),
    "thinking": (bool, str),
    "sampling": dict,
    "messages": list,
}


def read_chat(path: Path) -> dict[str, Any]:
    """The facts of a saved chat. MlxsteerError when the file is not one."""
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MlxsteerError(f"There is no file {path}. /save FILE makes one.") from None
    except OSError as error:
        raise MlxsteerError(f"Cannot read {path}: {error.strerror or error}.") from None
    except ValueError as error:
        raise _not_a_chat(path, str(error)) from None
    if not isinstance(facts, dict) or facts.get("format_version") != FORMAT_VERSION:
        raise _not_a_chat(path, f"no format_version {FORMAT_VERSION}")
    for key, kind in _KINDS.items():
        if key not in facts or not isinstance(facts[key], kind):
            raise _not_a_chat(path, f"{key!r} is missing or of the wrong kind")
    if facts["thinking"] not in (True, False, "max"):
        raise _not_a_chat(path, f"thinking is {facts['thinking']!r}")
    if not all(isinstance(message, dict) for message in facts["messages"]):
        raise _not_a_chat(path, "its messages are no messages")
    return facts


def _not_a_chat(path: Path, reason: str) -> MlxsteerError:
    return MlxsteerError(f"{path} is not a saved chat ({reason}). /save FILE makes one.")
