"""`mlxsteer chat` without a terminal: one shot, lines from a pipe, files, comparison, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import mlxsteer
from mlxsteer.cli import main
from mlxsteer.model import Model
from mlxsteer.prompting import render
from tests.chat_models import WORDS, chat_folder, random_directions

TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    random_directions().save(tmp_path / "home" / "vectors" / "tiny" / "push.safetensors")


@pytest.fixture
def model(folder: Path) -> Model:
    return mlxsteer.load(str(folder))


def chat(folder: Path, *arguments: str, stdin: str | None = None) -> Result:
    command = ["chat", "--model", str(folder), "--max-tokens", str(TOKENS), *arguments]
    result = CliRunner().invoke(main, command, input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def answers(result: Result) -> list[str]:
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()


# --- one shot -----------------------------------------------------------------------------------


def test_one_shot_prints_the_answer_alone(folder: Path, model: Model) -> None:
    result = chat(folder, "-p", "w3 w4", "--steer", "push:1r")
    assert answers(result) == [model.generate("w3 w4", "push:1r", max_tokens=TOKENS).strip()]
    assert result.stderr == ""


def test_a_dash_reads_the_question_from_stdin(folder: Path) -> None:
    assert answers(chat(folder, "-p", "-", stdin="w3 w4\n")) == answers(chat(folder, "-p", "w3 w4"))


def test_several_steer_options_add_up(folder: Path) -> None:
    one = answers(chat(folder, "-p", "w3", "--steer", "push:0.5r", "--steer", "push:0.5r"))
    assert one == answers(chat(folder, "-p", "w3", "--steer", "push:1r"))


def test_the_system_prompt_is_used(folder: Path, model: Model) -> None:
    messages = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w3"}]
    expected = model.generate(messages, max_tokens=TOKENS).strip()
    assert answers(chat(folder, "-p", "w3", "--system", "w9")) == [expected]


def test_a_seed_makes_sampling_repeatable(folder: Path) -> None:
    words = ("-p", "w3", "--temp", "1.5", "--top-k", "40", "--top-p", "0.99", "--min-p", "0.001")
    first, again, other = (chat(folder, *words, "--seed", seed) for seed in ("1", "1", "2"))
    assert answers(first) == answers(again) != answers(other)


def test_a_repetition_penalty_changes_the_answer(folder: Path) -> None:
    words = [*"abcdefgh"]
    plain = answers(chat(folder, "-p", " ".join(words), "--max-tokens", "40"))
    penalised = chat(
        folder, "-p", " ".join(words), "--max-tokens", "40", "--repetition-penalty", "3"
    )
    assert answers(penalised) != plain


def test_explain_and_warnings_go_to_stderr(folder: Path) -> None:
    result = chat(folder, "-p", "w3", "--steer", "push:6", "--explain")
    assert len(answers(result)) == 1
    assert "add at residual, layers 1-2, on answer positions" in result.stderr
    for warning in ("above 5, the edge", "uncalibrated"):
        assert result.stderr.count(warning) == 1
        assert chat(folder, "-p", "w3", "--steer", "push:6").stderr.count(warning) == 1


def test_thoughts_are_left_out_where_stdout_is_no_terminal(folder: Path, model: Model) -> None:
    tokens = render(model, [{"role": "user", "content": "w3"}], thinking=True)
    assert WORDS[tokens[-1]] == "<think>"
    result = chat(folder, "-p", "w3", "--think", "--json")
    facts = json.loads(result.stdout)
    assert facts["thinking"]
    spoken = chat(folder, "-p", "w3", "--think").stdout.strip()
    assert spoken == facts["answer"]


def test_json_reports_the_answer_and_its_numbers(folder: Path) -> None:
    result = chat(folder, "-p", "w3 w4", "--steer", "push:1r", "--compare", "--json")
    facts = json.loads(result.stdout)
    assert facts["answer"] == answers(chat(folder, "-p", "w3 w4", "--steer", "push:1r"))[0]
    assert facts["unsteered"] == answers(chat(folder, "-p", "w3 w4"))[0]
    assert (facts["steer"], facts["prompt_tokens"]) == ("push:1r", 5)
    assert facts["answer_tokens"] == len(facts["answer"].split()) == TOKENS
    assert facts["finish_reason"] == "length"


# --- comparison ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [(), ("--temp", "1.5", "--seed", "3")])
def test_compare_prints_both_answers_under_one_seed(
    folder: Path, sampling: tuple[str, ...]
) -> None:
    words = ("-p", "w3 w4", *sampling)
    plain, steered = (answers(chat(folder, *words, *more)) for more in ((), ("-s", "push:1r")))
    both = answers(chat(folder, *words, "-s", "push:1r", "--compare"))
    assert both == ["== unsteered ==", *plain, "", "== push:1r ==", *steered]


# --- lines from a pipe ----------------------------------------------------------------------------


def test_every_line_of_a_pipe_is_a_turn(folder: Path, model: Model) -> None:
    first = model.generate("w3", max_tokens=TOKENS).strip()
    asked = [
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "w4"},
    ]
    second = model.generate(asked, "push:1r", max_tokens=TOKENS).strip()
    result = chat(folder, stdin="w3\n\n/steer push:1r\nw4\n")
    assert answers(result) == [first, second]
    assert "Steering: push:1r" in result.stderr


def test_an_unknown_command_names_near_ones_and_the_chat_goes_on(folder: Path) -> None:
    result = chat(folder, stdin="/ster push:1r\nw3\n")
    assert result.exit_code == 1
    assert "Did you mean '/steer'" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_a_slash_can_be_said_to_the_model(folder: Path) -> None:
    said = answers(chat(folder, stdin=" /w3\n"))
    assert said == answers(chat(folder, stdin="//w3\n")) == answers(chat(folder, "-p", "/w3"))


def test_commands_change_what_follows(folder: Path) -> None:
    script = "/system w9\n/think\n/nothink\n/system off\n/reset\n/compare\n/steer push:1r\nw3\n"
    assert answers(chat(folder, stdin=script)) == answers(
        chat(folder, "-p", "w3", "-s", "push:1r", "--compare")
    )


def test_steers_lists_vectors_and_what_could_be_extracted(folder: Path) -> None:
    shown = answers(chat(folder, stdin="/steers\n"))
    assert shown[0] == "push  uncalibrated: mlxsteer calibrate push"
    assert "terse" in shown[1]


def test_steer_alone_explains_and_stats_count(folder: Path) -> None:
    shown = answers(chat(folder, "-s", "push:1r", stdin="/steer\nw3\nw4\n/stats\n"))
    assert shown[0].startswith("push:1r: add at residual, layers 1-2")
    assert shown[-1].startswith("prompt ")
    assert "0 of them" not in shown[-1]


def test_help_names_every_command(folder: Path) -> None:
    shown = chat(folder, stdin="/help\n").stdout
    for name in "steer steers compare think nothink system reset save load stats help".split():
        if name != "help":
            assert f"/{name}" in shown


def test_quit_ends_the_chat(folder: Path) -> None:
    assert answers(chat(folder, stdin="/quit\nw3\n")) == []


def test_a_turn_that_breaks_in_the_model_does_not_end_the_chat(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxsteer.session import Session

    ask = Session.ask

    def breaking(self: Session, text: str, **options: object) -> object:
        if text == "w4":
            raise RuntimeError("the device gave up")
        return ask(self, text, **options)  # type: ignore[arg-type]

    whole = answers(chat(folder, stdin="w3\nw5\n"))
    monkeypatch.setattr(Session, "ask", breaking)
    result = chat(folder, stdin="w3\nw4\nw5\n")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == whole
    assert "the device gave up (RuntimeError). The chat is as it was before." in result.stderr


# --- files --------------------------------------------------------------------------------------


def test_a_saved_chat_goes_on_where_it_stopped(folder: Path) -> None:
    words = ("--system", "w9", "-s", "push:1r", "--temp", "0.7", "--seed", "4")
    whole = answers(chat(folder, *words, stdin="w3\nw4\n"))
    assert answers(chat(folder, *words, "-p", "w3", "--save", "chat.json")) == whole[:1]
    assert answers(chat(folder, "--load", "chat.json", "-p", "w4")) == whole[1:]


def test_options_come_before_those_of_the_loaded_chat(folder: Path) -> None:
    chat(folder, "-s", "push:1r", "-p", "w3", "--save", "chat.json")
    chat(folder, "--load", "chat.json", "-s", "push:2r", "-p", "w4", "--save", "chat.json")
    saved = json.loads(Path("chat.json").read_text())
    assert (saved["steer"], len(saved["messages"])) == ("push:2r", 4)
    assert saved["sampling"]["max_tokens"] == TOKENS


def test_save_and_load_within_a_chat(folder: Path) -> None:
    whole = answers(chat(folder, stdin="w3\nw4\n"))
    script = "w3\n/save chat.json\n/reset\nw9\n/load chat.json\nw4\n"
    said = answers(chat(folder, stdin=script))
    assert [said[0], said[-1]] == whole


def test_save_and_load_need_a_file(folder: Path) -> None:
    result = chat(folder, stdin="/save\n/load\n/load gone.json\n")
    assert result.exit_code == 1
    assert result.stderr.count("Which file?") == 2
    assert "There is no file gone.json" in result.stderr
