"""A conversation: its messages, its prompt cache, its steering, live.

A prompt cache belongs to the steering that filled it: every cached token carries the stamp of
what was done at its position, and a turn reuses only the rows that it would compute again. So a
cached chat gives the same answers as one rendered from the start. A failed turn leaves the chat
as it was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from mlxsteer.errors import MlxsteerError
from mlxsteer.files import write_text
from mlxsteer.generation import Piece, Sampling, stream
from mlxsteer.plan import PROMPT, Plan
from mlxsteer.prompting import Messages, first_phase, messages_of, render

if TYPE_CHECKING:
    from mlxsteer.model import Model, Steer

FORMAT_VERSION = 1

Stamped = tuple[int, str]  # a token, and the key of what was done at its position


@dataclass
class CachedPrefix:
    """A prompt cache and what its rows hold."""

    cache: list[Any]
    rows: list[Stamped] = field(default_factory=list)

    def common(self, wanted: Sequence[Stamped]) -> int:
        """How many leading rows are as wanted."""
        pairs = zip(self.rows, wanted, strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.rows), len(wanted))
        )


@dataclass
class Turn:
    """What the last turn cost: prompt tokens, those found in the cache, tokens written."""

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
        thinking: bool = False,
        sampling: Sampling | None = None,
        force: bool = False,
    ) -> None:
        self.model = model
        self.sampling = sampling or Sampling()
        self.thinking = thinking
        self.force = force
        self.system = system
        self.messages: Messages = []
        self.last = Turn()
        self.plan = Plan([])
        self._prefix: CachedPrefix | None = None
        self._row: Any = None
        self.steer(steer)

    # --- settings --------------------------------------------------------------------------

    def steer(self, steer: Steer) -> Plan:
        """Set the steering; also of an answer that is being written, from its next token on."""
        plan = self.model.plan(steer, force=self.force)
        self.plan = plan
        if self._row is not None:
            self._row.control.plan = plan
        return plan

    def reset(self) -> None:
        """Forget the conversation; keep the settings."""
        self.messages = []
        self._prefix = None

    # --- talking ---------------------------------------------------------------------------

    def ask(
        self, text: str, *, on_prefill: Callable[[int, int], None] | None = None
    ) -> Iterator[Piece]:
        """The answer to `text`, piece by piece; kept with it when the turn ends.

        Closing the iterator early (or KeyboardInterrupt) keeps what was written so far. An error
        leaves the chat as it was.
        """
        asked: Messages = [*self.messages, {"role": "user", "content": text}]
        written: list[Piece] = []
        try:
            for piece in self._answer(asked, on_prefill):
                written.append(piece)
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            self._prefix = None  # the model may have run ahead of what was seen
            self._keep(asked, written, "interrupted")
            raise
        except BaseException:
            self._prefix = None
            raise
        else:
            self._keep(asked, written, written[-1].finish_reason or "length")
        finally:
            self._row = None

    def _keep(self, asked: Messages, written: Sequence[Piece], reason: str) -> None:
        answer = "".join(piece.text for piece in written if not piece.thinking).strip()
        thought = "".join(piece.text for piece in written if piece.thinking).strip()
        self.last.answer_tokens = len(written)
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
        self, asked: Messages, on_prefill: Callable[[int, int], None] | None
    ) -> Iterator[Piece]:
        tokens = render(self.model, self._with_system(asked), thinking=self.thinking)
        stamp = self.plan.stamp(PROMPT)
        wanted = [(token, stamp) for token in tokens[:-1]]
        cache, reused = self._cache_for(wanted)
        self.last = Turn(prompt_tokens=len(tokens), cached_tokens=reused)
        self._fill(cache, tokens, reused, on_prefill)
        self._prefix = self._kept_prefix(cache, wanted)
        pieces = stream(self.model, tokens, self.plan, self.sampling, cache=cache)
        rows = cache[-1].rows
        for piece in pieces:
            self._row = rows[0]
            self._note(tokens, piece)  # before the caller can change the steering
            yield piece

    def _with_system(self, messages: Messages) -> Messages:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return messages_of([*system, *messages])

    # --- the prompt cache --------------------------------------------------------------------

    def _cache_for(self, wanted: Sequence[Stamped]) -> tuple[list[Any], int]:
        """A cache whose rows are a prefix of `wanted`, and how many they are."""
        if self._prefix is None:
            return self._new_cache(), 0
        common = self._prefix.common(wanted)
        surplus = len(self._prefix.rows) - common
        cache = self._prefix.cache
        if surplus == 0:
            return (cache if self._trimmable(cache) else copy.deepcopy(cache)), common
        if common and self._trimmable(cache):
            trim_prompt_cache(cache[:-1], surplus)
            cache[-1].rows[0].seen = common
            return cache, common
        return self._new_cache(), 0

    def _new_cache(self) -> list[Any]:
        return self.model.steered.new_cache(self.model.row(self.plan, 0))

    @staticmethod
    def _trimmable(cache: list[Any]) -> bool:
        return bool(can_trim_prompt_cache(cache[:-1]))

    def _fill(
        self,
        cache: list[Any],
        tokens: Sequence[int],
        reused: int,
        on_prefill: Callable[[int, int], None] | None,
    ) -> None:
        """Run the prompt up to its last token, under the plan, in steps."""
        import mlx.core as mx

        from mlxsteer.generation import PREFILL_STEP

        row = cache[-1].rows[0]
        row.control.plan, row.prompt_length = self.plan, len(tokens)
        row.first, row.phase, row.recent = first_phase(self.model, tokens), 0, ()
        done = reused
        while done < len(tokens) - 1:
            step = list(tokens[done : min(done + PREFILL_STEP, len(tokens) - 1)])
            self.model.steered(mx.array([step]), cache)
            mx.eval([entry.state for entry in cache])
            done += len(step)
            if on_prefill:
                on_prefill(done, len(tokens))

    def _kept_prefix(self, cache: list[Any], rows: list[Stamped]) -> CachedPrefix:
        """The filled prompt: shared with the answer if it can be trimmed back, else a copy."""
        kept = cache if self._trimmable(cache) else copy.deepcopy(cache)
        return CachedPrefix(kept, list(rows))

    def _note(self, tokens: Sequence[int], piece: Piece) -> None:
        """Record that the cache now holds `piece` (and, before the first, the last prompt token)."""
        prefix = self._prefix
        if prefix is None or piece.token < 0 or prefix.cache[-1].rows[0].seen < len(tokens):
            return
        if len(prefix.rows) == len(tokens) - 1:
            row = prefix.cache[-1].rows[0]
            prefix.rows.append((tokens[-1], self.plan.stamp(PROMPT | row.first)))
        prefix.rows.append((piece.token, self.plan.stamp(piece.phase)))

    # --- keeping -----------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the chat as JSON: messages, steering, settings."""
        facts = {
            "format_version": FORMAT_VERSION,
            "model": self.model.label,
            "steer": str(self.plan),
            "system": self.system,
            "thinking": self.thinking,
            "sampling": asdict(self.sampling),
            "messages": self.messages,
        }
        write_text(path, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")

    def load(self, path: Path) -> None:
        """Go on with a saved chat. MlxsteerError when the file is not one; nothing changes then."""
        facts = _read_chat(path)
        try:
            messages = messages_of(facts["messages"]) if facts["messages"] else []
            plan = self.model.plan(facts.get("steer") or None, force=self.force)
            sampling = Sampling(**facts.get("sampling", {}))
            system, thinking = facts.get("system"), bool(facts.get("thinking"))
        except (KeyError, TypeError, AttributeError) as error:
            raise MlxsteerError(f"{path} is not a saved chat ({error!r}).") from None
        self.messages, self.system, self.thinking = messages, system, thinking
        self.plan, self.sampling, self._prefix = plan, sampling, None


def _read_chat(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MlxsteerError(f"There is no file {path}. /save FILE makes one.") from None
    except (OSError, ValueError) as error:
        raise MlxsteerError(f"{path} is not a saved chat ({error}).") from None
    if not isinstance(facts, dict) or facts.get("format_version") != FORMAT_VERSION:
        raise MlxsteerError(f"{path} is not a saved chat. /save FILE makes one.")
    return facts
