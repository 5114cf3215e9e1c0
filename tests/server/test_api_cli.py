"""`mlxsteer serve` typed wrong: one line that says what to type, before a model is loaded."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from mlxsteer.cli import main, serve
from mlxsteer.server.run import listen


@pytest.mark.parametrize(
    ("typed", "status", "said"),
    [
        (["--host", "0.0.0.0"], 2, "MLXSTEER_API_KEY"),
        (["--cache-size", "lots"], 2, "Type e.g. 500M"),
        (["--steer", "terse:x"], 2, "not a strength"),
        (
            ["--host", "no.such.host.invalid", "--insecure-no-key"],
            1,
            "Cannot serve on no.such.host.invalid:8080",
        ),
        (["--api-key", ""], 2, "The API key is empty"),
    ],
)
def test_wrong_options_say_what_to_type(typed: list[str], status: int, said: str) -> None:
    result = CliRunner().invoke(main, ["serve", *typed])
    assert result.exit_code == status
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_port_in_use_is_one_line() -> None:
    with listen("127.0.0.1", 0) as bound:
        result = CliRunner().invoke(main, ["serve", "--port", str(bound.getsockname()[1])])
    assert result.exit_code == 1
    assert "in use" in result.output
    assert len(result.output.splitlines()) == 1


def test_a_missing_extra_names_the_command_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "NEEDS", ("no_such_package",))
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 1
    assert "pip install 'mlxsteer[serve]'" in result.output


@pytest.mark.parametrize(("text", "size"), [("0", 0), ("500M", 500 << 20), ("1.5GiB", 3 << 29)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert serve.Size().convert(text, None, None) == size
