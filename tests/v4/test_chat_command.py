"""`mlxsteer chat` with a DeepSeek-V4 folder of random weights: commands, thoughts, steering.

The sampling seed is one whose thought ends by itself, so that an answer follows it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers

from mlxsteer.cli import main
from mlxsteer.models.deepseek_v4 import chat_format
from tests.chat_models import random_directions
from tests.tiny import edit_json
from tests.v4 import random_models

CONTROL = [
    chat_format.BOS,
    chat_format.EOS,
    chat_format.USER,
    chat_format.ASSISTANT,
    chat_format.THINK,
    chat_format.END_THINK,
]
PUSH = "./push.safetensors:2r"
SAMPLED = ("--max-tokens", "24", "--temp", "1", "--seed", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-v4"
    path.mkdir()
    random_models.write(path, "narrow", seed=0)
    size = random_models.config("narrow")["vocab_size"]
    words = [*CONTROL, *(f"w{index}" for index in range(size - len(CONTROL)))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(CONTROL)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": chat_format.EOS}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to work in, with a vector in a file."""
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    random_directions(width=random_models.config("narrow")["hidden_size"]).save(
        Path("push.safetensors")
    )


def chat(folder: Path, *arguments: str, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(main, ["chat", "-m", str(folder), *arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def facts(folder: Path, *arguments: str) -> dict[str, Any]:
    result = chat(folder, "-p", "w3 w4", *SAMPLED, "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def saved(folder: Path, script: str) -> list[dict[str, Any]]:
    """The messages of a chat of these lines."""
    result = chat(folder, *SAMPLED, stdin=script + "/save chat.json\n")
    assert result.exit_code == 0, result.stderr
    return json.loads(Path("chat.json").read_text())["messages"]


# --- thoughts and steering ------------------------------------------------------------------------


def test_a_thought_comes_before_the_answer_only_when_asked_for(folder: Path) -> None:
    plain, thoughtful = facts(folder), facts(folder, "--think")
    assert plain["thinking"] is None
    assert thoughtful["thinking"]
    assert thoughtful["answer"]


def test_the_greatest_effort_is_asked_for_in_the_prompt(folder: Path) -> None:
    usual, greatest = facts(folder, "--think"), facts(folder, "--think-max")
    assert greatest["prompt_tokens"] > usual["prompt_tokens"] + 20
    assert greatest["thinking"]


def test_steering_acts_on_the_answer_and_leaves_the_thought_alone(folder: Path) -> None:
    plain, steered = facts(folder, "--think"), facts(folder, "--think", "-s", PUSH)
    assert steered["thinking"] == plain["thinking"]
    assert steered["answer"] != plain["answer"]


def test_steering_at_think_positions_changes_the_thought(folder: Path) -> None:
    plain, steered = facts(folder, "--think"), facts(folder, "--think", "-s", f"{PUSH}@think")
    assert steered["thinking"] != plain["thinking"]


@pytest.mark.parametrize(
    ("limit", "seed", "said"),
    [
        ("6", "1", "still thinking when --max-tokens was reached"),
        ("24", "3", "ended after its thoughts without an answer"),
        ("24", "1", ""),
    ],
)
def test_why_there_is_no_answer_is_said(folder: Path, limit: str, seed: str, said: str) -> None:
    how = ("--think", "--temp", "1", "--max-tokens", limit, "--seed", seed)
    result = chat(folder, "-p", "w1 w2 w3", *how)
    assert said in result.stderr
    assert bool(result.stdout.strip()) == (not said)


def test_compare_shows_both_answers(folder: Path) -> None:
    words = ("-p", "w3 w4", *SAMPLED)
    plain, steered = (chat(folder, *words, *more).stdout for more in ((), ("-s", PUSH)))
    both = chat(folder, *words, "-s", PUSH, "--compare")
    assert both.stdout == f"== unsteered ==\n{plain}\n== {PUSH} ==\n{steered}"
    assert plain != steered


# --- commands in a chat ---------------------------------------------------------------------------


def test_commands_switch_thinking(folder: Path) -> None:
    script = "/think\nw3 w4\n/nothink\nw3\n/think-max\nw5\n"
    thoughts = [m.get("reasoning_content") for m in saved(folder, script)][1::2]
    assert thoughts[0] == facts(folder, "--think")["thinking"]
    assert thoughts[1] is None
    assert thoughts[2]


def test_a_chat_can_be_steered_reset_and_taken_up_again(folder: Path) -> None:
    plain, steered = facts(folder)["answer"], facts(folder, "-s", PUSH)["answer"]
    script = f"w3 w4\n/reset\n/steer {PUSH}\nw3 w4\n/save one.json\n/reset\n/steer off\nw9\n"
    result = chat(folder, *SAMPLED, stdin=f"{script}/load one.json\n/save two.json\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[:2] == [plain, steered]
    assert Path("two.json").read_text() == Path("one.json").read_text()
    assert json.loads(Path("two.json").read_text())["steer"] == PUSH


# --- folders that are refused ---------------------------------------------------------------------


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _without_a_tensor(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.attn.indexer.wq_b.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "cut short"),
        (_without_a_tensor, "Missing 1 parameters: model.layers.1.attn.indexer.wq_b.weight (V"),
        (_config(compress_ratios=[0, 4, 64, 4]), "compress_ratios contains 64"),
        (_config(compress_ratios=None), "lacks compress_ratios"),
        (_config(vision_n_layers=24), "vision"),
    ],
)
def test_a_folder_that_cannot_be_run_is_refused_in_one_line(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    damage(broken)
    result = chat(broken, "-p", "w3")
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
