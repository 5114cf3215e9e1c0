"""What the user types: lines, their history and completion, and lines typed while an answer runs.

Works with a terminal on stdin or a pipe, with GNU readline, libedit or neither. Knows the names
that can be completed, not what the commands do.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from mlxsteer.files import home_dir
from mlxsteer.grammar import POSITIONS

HISTORY_LINES = 1000
DELIMITERS = " \t\n,@"


class Keyboard:
    """Lines from stdin: with prompt, history and completion where it is a terminal.

    complete(line) gives the possible endings' full last words for the text before the cursor.
    """

    def __init__(self, complete: Callable[[str], list[str]]) -> None:
        self.interactive = sys.stdin.isatty()
        self._waiting: deque[str] = deque()
        self._ended = False
        self._readline = _readline() if self.interactive and sys.stdout.isatty() else None
        self._complete = complete

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside the block history and completion are on; the history is kept at its end."""
        if self._readline is None:
            yield
            return
        _set_up(self._readline, self._complete)
        try:
            yield
        finally:
            _keep_history(self._readline)

    def line(self, prompt: str) -> str | None:
        """The next line without its newline, or None at the end of input."""
        if self._waiting:
            line = self._waiting.popleft()
            print(f"{prompt}{line}", file=sys.stderr, flush=True)
            return line
        if self._ended:
            return None
        if self._readline is not None:
            try:
                return input(prompt)
            except EOFError:
                return None
        if self.interactive:  # stdout is not a terminal: prompts must not go there
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def typed_meanwhile(self, wanted: Callable[[str], bool]) -> list[str]:
        """Lines typed since the last call that are `wanted`; others wait for their turn."""
        found = []
        for line in self._ready_lines():
            if wanted(line):
                found.append(line)
            else:
                self._waiting.append(line)
        return found

    def _ready_lines(self) -> Iterator[str]:
        if not self.interactive:
            return
        # A terminal hands over one line per read, so nothing is taken from a line half typed.
        while not self._ended and select.select([sys.stdin], [], [], 0)[0]:
            typed = os.read(sys.stdin.fileno(), 1 << 16)
            self._ended = not typed
            line = typed.decode("utf-8", "replace").rstrip("\r\n")
            if line and self._readline is not None:
                self._readline.add_history(line)
            if typed:
                yield line


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside the block Ctrl-C only sets what the yielded function tells; a second one raises.

    So an answer is stopped between two tokens, where its prompt cache is whole.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


# --- completion ---------------------------------------------------------------------------------


def completions(line: str, commands: list[str], names: Callable[[], list[str]]) -> list[str]:
    """Full last words that could stand where `line` (the text before the cursor) ends."""
    command, blank, rest = line.partition(" ")
    if not blank:
        return [f"{name} " for name in commands if name.startswith(line)] if line else []
    if command == "/steer":
        return _steering(rest, names)
    if command == "/meter":
        start = rest.rpartition(",")[2].lstrip()
        found = [name for name in names() if name.startswith(start)]
        return [*found, "off"] if rest and "off".startswith(rest) else found
    return _paths(rest) if command in ("/save", "/load") else []


def _steering(text: str, names: Callable[[], list[str]]) -> list[str]:
    term = text.rpartition(",")[2].lstrip()
    _, at, positions = term.rpartition("@")
    if at:
        return [word for word in POSITIONS if word.startswith(positions)]
    found = [f"{name}:" for name in names() if name.startswith(term)]
    return [*found, "off"] if text == term and term and "off".startswith(term) else found


def _paths(text: str) -> list[str]:
    folder, _, start = text.rpartition("/")
    parent = Path(f"{folder}/" if folder or text.startswith("/") else ".").expanduser()
    shown = text[: len(text) - len(start)]
    try:
        entries = sorted(parent.iterdir())
    except OSError:
        return []
    return [
        f"{shown}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in entries
        if entry.name.startswith(start) and (start or not entry.name.startswith("."))
    ]


# --- readline -----------------------------------------------------------------------------------


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # some builds of Python have none
        return None
    return readline


def _history_file() -> Path:
    return home_dir() / "history"


def _set_up(readline: Any, complete: Callable[[str], list[str]]) -> None:
    def completer(word: str, state: int) -> str | None:
        before = readline.get_line_buffer()[: readline.get_endidx()]
        # readline replaces the last word as DELIMITERS cut it; a path may hold one of those.
        found = [whole for whole in complete(before) if whole]
        start = len(_last_word(before)) - len(word)
        return found[state][start:] if state < len(found) else None

    readline.set_completer_delims(DELIMITERS)
    readline.set_completer(completer)
    libedit = "libedit" in (readline.__doc__ or "")  # macOS; it has another syntax
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    readline.set_history_length(HISTORY_LINES)
    with suppress(OSError):  # none yet, or not readable: begin a new one
        readline.read_history_file(_history_file())


def _last_word(line: str) -> str:
    """What `completions` completes: after a command that takes a path, the whole rest."""
    command, blank, rest = line.partition(" ")
    if not blank:
        return line
    if command in ("/save", "/load"):
        return rest
    for delimiter in DELIMITERS:
        rest = rest.rpartition(delimiter)[2]
    return rest


def _keep_history(readline: Any) -> None:
    file = _history_file()
    with suppress(OSError):  # a history that cannot be kept is not worth an error
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
        file.chmod(0o600)
        readline.write_history_file(file)
