"""The chat in a terminal: completion, history, Ctrl-C, live steering, columns, dim thoughts.

Tests with `terminal` run the command in a real pseudo-terminal.
"""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

import mlxsteer
from mlxsteer.generation import Piece
from mlxsteer.plan import ANSWER, THINK
from mlxsteer.repl import Repl
from mlxsteer.repl_input import completions, stop_on_interrupt
from mlxsteer.repl_output import AnswerPrinter, Columns, harmless
from mlxsteer.session import Session
from tests.chat_models import chat_folder, random_directions

COMMANDS = ["/steer", "/steers", "/save", "/load"]


def complete(line: str) -> list[str]:
    return completions(line, COMMANDS, lambda: ["formal", "terse"])


# --- completion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/st", ["/steer ", "/steers "]),
        ("/steer ", ["formal:", "terse:"]),
        ("/steer te", ["terse:"]),
        ("/steer terse:3, fo", ["formal:"]),
        ("/steer terse:3@th", ["think"]),
        ("/steer o", ["off"]),
        ("/steer terse:3, o", []),
        ("/steer terse:", []),
        ("Why", []),
        ("", []),
    ],
)
def test_commands_and_names_are_completed(line: str, found: list[str]) -> None:
    assert complete(line) == found


def test_files_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "monday, long.json").touch()
    (tmp_path / ".hidden").touch()
    monkeypatch.chdir(tmp_path)
    assert complete("/load ") == ["chats/"]
    assert complete("/save chats/mon") == ["chats/monday, long.json"]
    assert complete(f"/load {tmp_path}/ch") == [f"{tmp_path}/chats/"]
    assert complete("/load nowhere/x") == []


# --- output -------------------------------------------------------------------------------------


class Terminal:
    """A stdout that says that it is a terminal."""

    def __init__(self) -> None:
        self.text = ""
        self.encoding = "utf-8"

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


THOUGHT = [Piece("hm", 1, THINK), Piece(" ok", 2, THINK), Piece(" Yes.", 3, ANSWER, "stop")]


@pytest.mark.parametrize(
    ("colour", "expected"),
    [({}, "\x1b[2mhm ok\x1b[0m Yes.\n"), ({"NO_COLOR": "1"}, "hm ok Yes.\n")],
)
def test_thoughts_are_dim_unless_styles_are_unwanted(
    monkeypatch: pytest.MonkeyPatch, colour: dict[str, str], expected: str
) -> None:
    screen = Terminal()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in colour.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", screen)
    printer = AnswerPrinter()
    for piece in THOUGHT:
        printer(piece)
    printer.end()
    assert screen.text == expected


def test_thoughts_are_left_out_of_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    printer = AnswerPrinter()
    for piece in THOUGHT:
        printer(piece)
    printer.end()
    assert capsys.readouterr().out == "Yes.\n"


def test_a_model_cannot_send_escape_sequences_to_the_terminal() -> None:
    assert harmless("a\x1b]0;title\x07b\r\x9bc\td\n") == "a]0;titlebc\td\n"


def test_columns_stand_side_by_side_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "83")
    monkeypatch.setenv("LINES", "6")
    monkeypatch.setenv("NO_COLOR", "1")
    columns = Columns(("unsteered", "terse:3"))
    with columns.open() as sides:
        for index, words in enumerate(("many words " * 30, "日本 few words")):
            with sides.side(index) as show:
                show(Piece(words, 1, ANSWER))
    final = screen.text.rpartition("unsteered")[2]
    rows = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", final).splitlines()
    assert rows[0].split() == ["terse:3"]
    assert rows[1].startswith("many words many")
    assert rows[1].endswith("日本 few words")
    assert sum(row.count("many") for row in rows) == 30


# --- Ctrl-C -------------------------------------------------------------------------------------


def test_the_first_interrupt_asks_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


class Typist:
    """A keyboard in whose place lines and Ctrl-C come from a list."""

    interactive = True

    def __init__(self, *typed: str | None) -> None:
        self.typed = list(typed)

    def open(self) -> AbstractContextManager[None]:
        return nullcontext()

    def line(self, prompt: str) -> str | None:
        line = self.typed.pop(0)
        if line == "^C":
            raise KeyboardInterrupt
        return line


@pytest.mark.parametrize(
    ("typed", "left"), [(("^C", "^C", "rest"), 1), (("^C", "/help", "^C", None, "rest"), 1)]
)
def test_a_second_interrupt_in_a_row_leaves(
    folder: Path, capsys: pytest.CaptureFixture[str], typed: tuple[str | None, ...], left: int
) -> None:
    repl = Repl(Session(mlxsteer.load(str(folder))))
    repl.keyboard = Typist(*typed)  # type: ignore[assignment]
    assert repl.run() == 0
    assert len(repl.keyboard.typed) == left  # type: ignore[attr-defined]
    assert "Ctrl-C again" in capsys.readouterr().err


# --- a real terminal ------------------------------------------------------------------------------


class Chat:
    """`mlxsteer chat` in a pseudo-terminal of 100 columns."""

    def __init__(self, home: Path, folder: Path, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "MLXSTEER_HOME": str(home), "TERM": "xterm", "COLUMNS": "100"}
        command = [sys.executable, "-m", "mlxsteer", "chat", "--model", str(folder), *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            cwd=home,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, seconds: float = 40) -> str:
        """What appeared up to and with `text`; forgets it."""
        end = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < end, f"{text!r} is not in {self.screen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self.master, 4096).decode("utf-8", "replace")
                except OSError:  # the other end is closed
                    assert text in self.screen, f"{text!r} is not in {self.screen!r}"
        seen, _, self.screen = self.screen.partition(text)
        return seen + text

    def close(self) -> int:
        status = self.process.wait(timeout=40)
        os.close(self.master)
        return status


def _own_terminal() -> None:
    """Make the pseudo-terminal the one that Ctrl-C comes from."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends an answer by itself: its end token is not in its vocabulary."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    return chat_folder(path, max_position_embeddings=100_000, eos_token_id=99)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    random_directions().save(tmp_path / "vectors" / "tiny" / "push.safetensors")
    return tmp_path


@pytest.fixture
def terminal(home: Path, folder: Path) -> Iterator[Chat]:
    chat = Chat(home, folder, "--max-tokens", "90000")
    yield chat
    if chat.process.poll() is None:
        chat.process.kill()


def test_a_chat_in_a_terminal(terminal: Chat, home: Path) -> None:
    """Completion, an answer steered while it runs, stopped by Ctrl-C, and leaving by Ctrl-D."""
    terminal.wait_for("> ")
    terminal.type("/steer pu\t0.1r\n")
    terminal.wait_for("Steering: push:0.1r")
    terminal.wait_for("push:0.1r > ")
    terminal.type("w3 w4\n")
    terminal.wait_for(" w")
    terminal.type("/steer push:0.2r\n")
    terminal.wait_for("Steering: push:0.2r")
    terminal.type("/stats\n")  # waits for its turn
    terminal.wait_for("/stats")
    for _ in range(50):  # a terminal forgets what was not read yet when Ctrl-C comes
        terminal.wait_for(" w")
    terminal.type("\x03")
    terminal.wait_for("Stopped.")
    terminal.wait_for("push:0.2r > /stats")
    terminal.wait_for("ended by interrupted")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.close() == 0
    history = home / "history"
    typed = ["/steer push:0.1r", "w3 w4", "/steer push:0.2r", "/stats"]
    assert history.read_text().splitlines() == typed
    assert history.stat().st_mode & 0o777 == 0o600
