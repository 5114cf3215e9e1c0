"""The chat in a terminal or a pipe: lines in, answers out, commands that begin with a slash.

Owns the loop, the commands and what Ctrl-C means. The conversation is `session`'s, what is typed
`repl_input`'s, what is shown `repl_output`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlxsteer import library
from mlxsteer.errors import MlxsteerError, UsageError, near_matches
from mlxsteer.generation import Piece
from mlxsteer.meter import series_of
from mlxsteer.meter_output import MeteredPrinter, show_table
from mlxsteer.prompting import Thinking
from mlxsteer.repl_input import Keyboard, completions, stop_on_interrupt
from mlxsteer.repl_output import (
    AnswerPrinter,
    complain,
    note,
    note_if_empty,
    show_prefill,
    side_by_side,
)
from mlxsteer.session import Session

UNSTEERED = "unsteered"
PROMPT_WIDTH = 24  # of the steering shown before "> "
HELP = """\
/steer terse:3     steer from the next token on; also typed while an answer runs
/steer             what is steered now: where, how much, on which positions
/steer off         the unsteered model
/steers            the vectors for this model, and how far each can go
/compare           switch: each answer beside the unsteered one
/meter terse       colour what is written by how far along a vector it lies; /meter off
/think /nothink    let the model think first, or not; /think-max asks for its greatest effort
/system TEXT       set the system prompt; /system off removes it
/reset             forget the conversation, keep the settings
/save FILE         keep the chat; /load FILE goes on with one
/stats             tokens of the last turn
/quit              leave (as Ctrl-D does)
Ctrl-C stops an answer and keeps what was written. A line that begins with a blank, or with //,
goes to the model as it is."""


class Repl:
    """A chat: `run` talks until the input ends and returns the exit status.

    compare: answer unsteered, too. save: a file that holds the chat after every turn.
    """

    def __init__(
        self, session: Session, *, compare: bool = False, save: Path | None = None
    ) -> None:
        self.session = session
        self.compare = compare
        self.save = save
        self.failed = False
        self.running = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/steer": self._steer,
            "/steers": self._steers,
            "/compare": self._compare,
            "/meter": self._meter,
            "/think": partial(self._think, True),
            "/think-max": partial(self._think, "max"),
            "/nothink": partial(self._think, False),
            "/system": self._system,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/help": self._help,
        }
        complete = partial(completions, commands=[*self.commands, "/quit"], names=self._names)
        self.keyboard = Keyboard(complete)

    # --- the loop ----------------------------------------------------------------------------

    def run(self) -> int:
        """Talk until the input ends. 0, or 1 when a line of a pipe failed."""
        if self.keyboard.interactive:
            note("/help lists the commands, Ctrl-D leaves.")
        self.running = True
        with self.keyboard.open():
            while (line := self._next_line()) is not None:
                if line.strip() in ("/quit", "/exit"):
                    break
                self._guarded(line)
        return 1 if self.failed and not self.keyboard.interactive else 0

    def _next_line(self) -> str | None:
        """A line with something on it; None at the end, or when Ctrl-C was pressed twice."""
        pressed = False
        while True:
            try:
                line = self.keyboard.line(self._prompt())
            except KeyboardInterrupt:
                if pressed or not self.keyboard.interactive:
                    return None
                pressed = True
                note("\nCtrl-C again, or Ctrl-D, leaves the chat.")
                continue
            if line is None:
                return None
            if line.strip():
                return line
            pressed = False

    def _prompt(self) -> str:
        steering = str(self.session.plan)
        return f"{steering if len(steering) <= PROMPT_WIDTH else 'steered'} > ".lstrip()

    def _guarded(self, line: str) -> None:
        """Do what the line says; whatever goes wrong leaves the chat as it was."""
        try:
            self._do(line)
        except KeyboardInterrupt:
            note("\nStopped.")
        except MlxsteerError as error:
            self._complain(str(error))
        except BrokenPipeError:
            raise  # nobody reads the answers any more
        except Exception as error:  # models and drivers fail in their own ways; keep the chat
            self._complain(f"{error} ({type(error).__name__}). The chat is as it was before.")

    def _complain(self, message: str) -> None:
        complain(message)
        self.failed = True

    def _do(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            self._command(line.strip())
            return
        try:
            self.answer(line[1:] if line.startswith("//") else line.strip())
        finally:
            if self.save and self.session.messages:
                self.session.save(self.save)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            raise UsageError(
                f"There is no command {name}.{near_matches(name, self.commands)} /help lists them;"
                " to say this to the model, begin the line with a blank."
            )
        self.commands[name](rest.strip())

    # --- answers -----------------------------------------------------------------------------

    def answer(self, text: str) -> None:
        """Stream the answer to `text`; KeyboardInterrupt when it was stopped, its part kept."""
        if self.compare and self.session.plan:
            self._answer_twice(text)
            return
        probes = self.session.probes
        printer = MeteredPrinter(probes) if probes else AnswerPrinter()
        try:
            self._stream(self.session.ask, text, printer)
        finally:
            printer.end()

    def _answer_twice(self, text: str) -> None:
        """The unsteered answer and, under the same seed, the steered one, which is kept."""
        session, sampling = self.session, self.session.sampling
        if sampling.temp > 0 and sampling.seed is None:
            session.sampling = replace(sampling, seed=random.getrandbits(31))
        labels = (UNSTEERED, str(session.plan))
        written: tuple[list[Piece], list[Piece]] = ([], [])
        try:
            with side_by_side(labels).open() as sides:
                for index, ask in enumerate((session.ask_plain, session.ask)):
                    with sides.side(index) as show:
                        self._stream(ask, text, _both(show, written[index].append))
        finally:
            session.sampling = sampling
        for label, pieces in zip(labels, written, strict=True):
            show_table(session.probes, series_of(session.probes, pieces), label)

    def _stream(
        self,
        ask: Callable[..., Generator[Piece]],
        text: str,
        show: Callable[[Piece], None],
    ) -> None:
        with stop_on_interrupt() as stopped:

            def on_prefill(done: int, total: int) -> None:
                show_prefill(done, total)
                _check(stopped)

            shown = []
            with closing(ask(text, on_prefill=on_prefill)) as pieces:
                for piece in pieces:
                    show(piece)
                    shown.append(piece)
                    _check(stopped)
                    if self.running:
                        self._steer_live()
            note_if_empty(shown)

    def _steer_live(self) -> None:
        """Obey `/steer` lines typed while the answer runs; other lines wait."""
        for line in self.keyboard.typed_meanwhile(lambda typed: typed.startswith("/steer ")):
            note("")  # the answer stands in the middle of a line
            try:
                self._steer(line.partition(" ")[2].strip())
            except MlxsteerError as error:
                self._complain(str(error))

    # --- commands ----------------------------------------------------------------------------

    def _steer(self, text: str) -> None:
        if not text:
            print(self.session.plan.explain())
            return
        plan = self.session.steer(None if text == "off" else text)
        note(f"Steering: {plan or 'off'}")
        for warning in plan.warnings:
            note(warning)

    def _steers(self, rest: str) -> None:
        for line in steering_lines(self.session):
            print(line)

    def _compare(self, rest: str) -> None:
        self.compare = not self.compare
        note(f"Compare: {'on' if self.compare else 'off'}")

    def _meter(self, text: str) -> None:
        if text:
            self.session.meter(() if text == "off" else text)
        probes = self.session.probes
        note(f"Meter: {', '.join(f'{p.name}@{p.layer}' for p in probes) or 'off'}")

    def _think(self, thinking: Thinking, rest: str) -> None:
        self.session.think(thinking)
        note(f"Thinking: {'maximum' if thinking == 'max' else 'on' if thinking else 'off'}")

    def _system(self, text: str) -> None:
        if text:
            self.session.system = None if text == "off" else text
        note(f"System prompt: {self.session.system or 'none of yours'}")

    def _reset(self, rest: str) -> None:
        self.session.reset()
        note("The conversation begins anew.")

    def _save(self, name: str) -> None:
        path = _path(name, "/save chat.json")
        self.session.save(path)
        note(f"Saved to {path}")

    def _load(self, name: str) -> None:
        path = _path(name, "/load chat.json")
        for warning in self.session.load(path):
            note(warning)
        turns = sum(message["role"] == "user" for message in self.session.messages)
        note(f"Loaded {path}: {turns} turns, steering {self.session.plan or 'off'}")

    def _stats(self, rest: str) -> None:
        turn = self.session.last
        print(
            f"prompt {turn.prompt_tokens} tokens, {turn.cached_tokens} of them from the cache;"
            f" answer {turn.answer_tokens} tokens; ended by {turn.finish_reason or 'nothing yet'}"
        )

    def _help(self, rest: str) -> None:
        print(HELP)

    def _names(self) -> list[str]:
        from mlxsteer import contrast

        return sorted({*library.available(self.session.model.key), *contrast.available()})


def steering_lines(session: Session) -> list[str]:
    """The vectors for the session's model with their limits, and what could be extracted."""
    from mlxsteer import contrast
    from mlxsteer.vector import SteeringVector

    found = library.available(session.model.key)
    width = max(map(len, found), default=0)
    lines = []
    for name, path in found.items():
        try:
            vector = SteeringVector.load(path)
        except MlxsteerError as error:
            lines.append(f"{name:<{width}}  {error}")
            continue
        limit = vector.calibration
        state = (
            f"calibrated: dose {-limit.delta_minus:.2f} to {limit.delta_plus:.2f}"
            if limit
            else f"uncalibrated: mlxsteer calibrate {name}"
        )
        lines.append(f"{name:<{width}}  {state}")
    others = [name for name in contrast.available() if name not in found]
    return [*lines, f"extracted when first used: {', '.join(others)}"]


def _path(name: str, example: str) -> Path:
    if not name:
        raise UsageError(f"Which file? Type e.g. {example}")
    return Path(name).expanduser()


def _both(*takers: Callable[[Piece], None]) -> Callable[[Piece], None]:
    def take(piece: Piece) -> None:
        for taker in takers:
            taker(piece)

    return take


def _check(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise KeyboardInterrupt
