"""How readings are shown: colours for a terminal, a table for everything else, JSON when asked."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mlxsteer import library
from mlxsteer.cli import main
from mlxsteer.generation import Piece, Sampling
from mlxsteer.meter_output import BARS, COLOURS, MeteredPrinter, colour_of, levels
from mlxsteer.model import Model
from mlxsteer.plan import ANSWER, THINK
from mlxsteer.probe import NORM_MARGIN, Probe
from mlxsteer.repl import Repl
from mlxsteer.session import Session
from tests.chat_models import random_directions
from tests.test_repl import Terminal

BETWEEN = Probe("terse", 12, "residual", np.ones(1, np.float32), 0.0, 1.0)
NORMED = Probe("formal", 9, "residual", np.ones(1, np.float32), 0.0, 1.0, NORM_MARGIN, False)
READ = [
    Piece("hm ", 1, THINK, None, (0.9, 0.5)),
    Piece("low", 2, ANSWER, None, (0.0, 0.01)),
    Piece(" mid", 3, ANSWER, None, (0.5, 0.03)),
    Piece(" high", 4, ANSWER, None, (1.0, 0.05)),
    Piece("", 0, ANSWER, "stop"),
]

pytestmark = pytest.mark.usefixtures("own_folders")


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` (WCAG 2.1)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def printed(monkeypatch: pytest.MonkeyPatch, *probes: Probe, **environment: str) -> str:
    screen = Terminal()
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", "COLORTERM": "truecolor", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", screen)
    printer = MeteredPrinter(probes)
    for piece in READ:
        printer(piece)
    printer.end()
    return screen.text


# --- colours --------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [colour for colour in COLOURS if colour])
def test_colours_stand_out_from_black_and_from_white(colour: str) -> None:
    light = luminance(colour)
    assert min(1.05 / (light + 0.05), (light + 0.05) / 0.05) > 3


def test_levels_run_between_the_poles_or_about_the_mean() -> None:
    readings = np.array([-1, 0.1, 0.5, 0.7, 3])
    assert levels(BETWEEN, readings, 9.0) == pytest.approx([-1, -1, 0, 0.5, 1])
    assert levels(NORMED, np.array([0.0, 0.06, 0.12]), 0.06) == pytest.approx([-0.5, 0, 0.5])
    assert [colour_of(level) for level in (-1, -0.5, 0, 0.5, 1)] == list(COLOURS)


def test_a_terminal_gets_tokens_coloured_by_the_first_meter(monkeypatch) -> None:
    text = printed(monkeypatch, BETWEEN, NORMED)
    assert "\x1b[38;2;31;119;208mlow\x1b[0m mid\x1b[38;2;224;100;28m high\x1b[0m" in text
    assert text.startswith("\x1b[2mhm ")  # thoughts stay dim
    legend = text.splitlines()[-1]
    assert legend.count("■") == len(COLOURS)
    assert legend.startswith("terse: less ")


def test_without_colours_a_table_has_it_all(monkeypatch) -> None:
    text = printed(monkeypatch, BETWEEN, NORMED, NO_COLOR="1")
    assert "\x1b" not in text
    assert text.splitlines() == [
        "hm low mid high",
        "",
        "meter       mean  lowest  highest  over the answer",
        f"terse@12  +0.500  +0.000   +1.000  {BARS[0]}{BARS[4]}{BARS[7]}",
        f"formal@9  +0.030  +0.010   +0.050  {BARS[3]}{BARS[4]}{BARS[4]}",
        "terse: 0 and 1 are where the examples of the two poles lie."
        " formal: readings in residual norms, shown about the answer's own mean.",
    ]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def push(folder: Path) -> None:
    library.save(random_directions(), library.model_key(str(folder)))


def chat(folder: Path, *words: str, stdin: str | None = None, exits: int = 0):
    arguments = ["chat", "--model", str(folder), "--max-tokens", "6", *words]
    result = CliRunner().invoke(main, arguments, input=stdin, catch_exceptions=False)
    assert result.exit_code == exits, result.output
    return result


def test_a_pipe_gets_the_answer_and_stderr_the_table(folder: Path, push) -> None:
    plain = chat(folder, "-p", "w1 w2")
    metered = chat(folder, "-p", "w1 w2", "--meter", "push")
    assert metered.stdout == plain.stdout
    assert "meter" not in plain.stderr
    assert re.search(r"^push@2 +[+-]\d\.\d{3} ", metered.stderr, re.MULTILINE)


def test_json_has_the_series(folder: Path, push) -> None:
    words = ("-p", "w1 w2", "--meter", "push,push@1", "--steer", "push:1r", "--json", "--compare")
    found = json.loads(chat(folder, *words).stdout)
    meter = found["meter"]
    assert (meter["names"], meter["layers"]) == (["push", "push"], [2, 1])
    assert len(meter["readings"]) == len(meter["tokens"]) == found["answer_tokens"]
    assert "".join(meter["texts"]).split() == found["answer"].split()
    steered, plain = (np.mean(found[key]["readings"]) for key in ("meter", "unsteered_meter"))
    assert steered > plain  # a steered direction reads its own shift
    assert "meter" not in json.loads(chat(folder, "-p", "w1", "--json").stdout)


def test_compare_shows_a_table_for_each_side(folder: Path, push) -> None:
    words = ("-p", "w1 w2", "--meter", "push", "--steer", "push:1r", "--compare")
    lines = chat(folder, *words).stderr.splitlines()
    assert [line for line in lines if line in ("unsteered", "push:1r")] == ["unsteered", "push:1r"]
    assert sum(line.startswith("push@2") for line in lines) == 2


def test_meters_that_cannot_be_read_are_refused(folder: Path, push) -> None:
    assert "Did you mean 'push'" in chat(folder, "--meter", "pusch", "-p", "w1", exits=1).stderr
    assert "No meter is named" in chat(folder, "--meter", "", "-p", "w1", exits=2).stderr


def test_the_meter_is_switched_in_the_chat(tiny: Model, folder: Path, push, capsys) -> None:
    repl = Repl(Session(tiny, sampling=Sampling(max_tokens=4)))
    tables = []
    for line in (
        "/meter",
        "w1",
        "/meter push@1",
        "w2",
        "/meter pusch",
        "/meter",
        "/meter off",
        "w3",
    ):
        repl._guarded(line)
        tables.append(capsys.readouterr().err)
    assert tables[0] == tables[6] == "Meter: off\n"
    assert tables[2] == tables[5] == "Meter: push@1\n"
    assert tables[1] == tables[7] == ""
    assert "push@1 " in tables[3]
    assert "Did you mean 'push'" in tables[4]
