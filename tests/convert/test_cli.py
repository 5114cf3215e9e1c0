"""`mlxsteer convert` as typed: stdout, stderr, exit status."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from click.testing import CliRunner, Result
from huggingface_hub.errors import LocalTokenNotFoundError

from mlxsteer.cli import main
from mlxsteer.convert.upload import upload
from tests.convert.conftest import FIXTURES, TINY


def typed(*words: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, words)])


def test_help_shows_an_example_and_the_helpers() -> None:
    text = typed("--help").stdout
    assert "mlxsteer convert deepseek-ai/DeepSeek-V4-Flash --recipe q2 --dry-run" in text
    assert "mlxsteer convert verify DIR" in text


def test_list_has_the_exact_bytes_of_every_recipe() -> None:
    text = typed("--list").stdout
    assert "156,189,074,524" in text
    rows = json.loads(typed("--list", "--json").stdout)
    assert [row["recipe"] for row in rows] == ["lossless", "q4-fast", "q3", "q2", "q2-fast"]
    assert {row["bytes_in"] for row in rows} == {159_609_485_896}
    assert {row["tensors_in"] for row in rows} == {69_187}


def test_dry_run_of_the_published_model_needs_no_network_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("deepseek-ai/DeepSeek-V4-Flash", "--out", out, "--dry-run")
    facts = json.loads(typed(*words, "--json").stdout)
    assert (facts["tensors_in"], facts["bytes_in"]) == (69_187, 159_609_485_896)
    assert facts["bytes_out"] == 156_189_074_524
    assert "in:  69,187 tensors, 159,609,485,896 bytes" in typed(*words).stdout
    assert not out.exists()


def test_converting_prints_the_result_on_stdout_and_progress_on_stderr(tmp_path: Path) -> None:
    result = typed(TINY, "--out", tmp_path / "out", "--recipe", "q2")
    assert result.exit_code == 0
    assert "5,482,940 bytes in 7 files" in result.stdout
    assert "mx.quantize" in result.stdout
    assert "writing layers.4" in result.stderr
    assert "writing" not in result.stdout


def test_json_result(tmp_path: Path) -> None:
    facts = json.loads(typed(TINY, "--out", tmp_path / "out", "--json").stdout)
    assert facts["bytes"] == 5_876_156
    assert facts["errors"] == {}


def test_the_model_card_tells_recipe_errors_and_every_hash(
    converted: Callable[[str], Path],
) -> None:
    card = (converted("q2") / "README.md").read_text()
    record = json.loads((converted("q2") / "conversion.json").read_text())
    assert "recipe: q2" in card
    for name in record["shards"]:
        digest = hashlib.sha256((converted("q2") / name).read_bytes()).hexdigest()
        assert record["shards"][name]["sha256"] == digest
        assert f"{digest}" in card
    assert f"{100 * record['errors']['experts']['error']:.3f}%" in card


def test_verify_exits_1_when_something_is_wrong(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    good = typed("verify", converted("lossless"), "--against", TINY, "--all")
    assert (good.exit_code, good.stdout.splitlines()[-1]) == (0, "good")
    copy = shutil.copytree(converted("lossless"), tmp_path / "copy")
    (copy / "model-00001-of-00007.safetensors").unlink()
    bad = typed("verify", copy)
    assert bad.exit_code == 1
    assert "WRONG: " in bad.stdout


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ((), 2, "Say what to convert"),
        (("no-such-folder",), 1, "There is no folder no-such-folder"),
        ((TINY, "--recipe", "q9"), 2, "There is no recipe 'q9'"),
        ((TINY, "--revision", "main"), 1, "is a folder, which has no revisions"),
        ((TINY, "--upload", "no-slash"), 2, "--upload takes OWNER/NAME"),
        (("verify", "no-such-folder"), 1, ""),
    ],
)
def test_errors_are_one_line_without_a_traceback(
    words: tuple[object, ...], status: int, says: str
) -> None:
    result = typed(*words)
    assert result.exit_code == status
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxsteer.convert.run.check_written", stop)
    result = typed(TINY, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "the same command goes on from there" in result.stderr


def test_portable_is_added_to_a_finished_result(tmp_path: Path) -> None:
    typed(TINY, "--out", tmp_path / "out")
    assert typed(TINY, "--out", tmp_path / "out", "--portable").exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / config["model_file"]).is_file()


@pytest.mark.slow
def test_a_portable_folder_gives_the_golden_logits_in_plain_mlx_lm(tmp_path: Path) -> None:
    """In a process where importing mlxsteer fails."""
    assert typed(TINY, "--out", tmp_path / "out", "--portable").exit_code == 0
    script = f"""
import sys
sys.modules["mlxsteer"] = None
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx_lm.utils import load_model
golden = np.load({str(FIXTURES / "tiny_fp8fp4.npz")!r})
model, _ = load_model(Path({str(tmp_path / "out")!r}), trust_remote_code=True,
                      model_config={{"activation_rounding": False}})
model.set_dtype(mx.float32)
print(abs(np.array(model(mx.array(golden["ids"][None]))[0]) - golden["logits"]).max())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert float(done.stdout or "nan") < 1e-4, done.stderr


@pytest.mark.slow
def test_mlx_lm_evaluates_and_serves_a_portable_folder(tmp_path: Path) -> None:
    """Its perplexity is the golden logits', and its server answers, without mlxsteer."""
    source, out = shutil.copytree(TINY, tmp_path / "model"), tmp_path / "out"
    write_tokenizer(source)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert typed(source, "--out", out, "--portable").exit_code == 0
    golden = np.load(FIXTURES / "tiny_fp8fp4.npz")
    begin = f"""
import sys
sys.modules["mlxsteer"] = None
import mlx.core as mx, numpy as np
from mlx_lm import perplexity, server, utils
golden = np.load({str(FIXTURES / "tiny_fp8fp4.npz")!r})
"""
    evaluation = f"""
model, _ = utils.load({str(out)!r}, trust_remote_code=True)
model.set_dtype(mx.float32)
print(perplexity.eval_ppl(model, mx.array(golden["ids"][None]))[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", begin + evaluation], capture_output=True, text=True
    )
    logits, ids = golden["logits_qat"].astype(np.float64)[:-1], golden["ids"][1:]
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids)), ids]
    assert float(done.stdout.split()[-1]) == pytest.approx(np.exp(losses.mean()), rel=1e-3)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", str(out), "--trust-remote-code", "--port", str(port)]
    serving = f"sys.argv[1:] = {words!r}\nserver.main()"
    with subprocess.Popen([sys.executable, "-c", begin + serving]) as running:
        try:
            answer = completion(port, {"prompt": "one two three", "max_tokens": 2})
        finally:
            running.kill()
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")


def completion(port: int, body: dict[str, Any]) -> Any:
    """The answer of a server that may not have started yet."""
    request = Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    for _ in range(60):
        try:
            with urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except URLError:
            time.sleep(0.5)
    raise AssertionError("the server did not start in 30 seconds")


def test_importance_from_texts_to_a_smaller_model(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shutil.copytree(converted("lossless"), tmp_path / "model")
    write_tokenizer(model)
    texts, found = tmp_path / "texts.txt", tmp_path / "importance.safetensors"
    texts.write_text("one two three\n\nfour five six seven eight")
    words = ("importance", model, "--out", found, "--prompts", texts, "--json")
    facts = json.loads(typed(*words).stdout)
    assert (facts["tokens"], facts["texts"]) == (8, 2)
    result = typed(model, "--out", tmp_path / "out", "--recipe", "q2", "--importance", found)
    assert result.exit_code == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        model / "tokenizer.json"
    ).read_bytes()


def write_tokenizer(folder: Path) -> None:
    """Words by number: the smallest file that the tokenizers library reads."""
    words = ["?", "one", "two", "three", "four", "five", "six", "seven", "eight"]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "unk_token": "?",
                                   "vocab": {w: i for i, w in enumerate(words)}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


class FakeHub:
    """Takes uploads; fails once after `limit` files."""

    def __init__(self, limit: int = 99):
        self.files: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.limit = limit

    def whoami(self) -> dict[str, Any]:
        return {"name": "me", "orgs": [{"name": "team"}]}

    def create_repo(self, repo: str, exist_ok: bool) -> str:
        return f"hub:{repo}"

    def model_info(self, repo: str, files_metadata: bool) -> Any:
        from hashlib import sha256

        return SimpleNamespace(siblings=[
            SimpleNamespace(rfilename=n, lfs=SimpleNamespace(
                size=len(d), sha256=sha256(d).hexdigest()))
            for n, d in self.files.items()
        ])  # fmt: skip

    def upload_file(self, path_or_fileobj: Path, path_in_repo: str, repo_id: str) -> None:
        if len(self.sent) == self.limit:
            raise ConnectionError("network gone")
        self.sent.append(path_in_repo)
        self.files[path_in_repo] = path_or_fileobj.read_bytes()


def test_an_upload_goes_on_where_it_stopped_and_sends_config_last(
    converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(limit=3)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    with pytest.raises(Exception, match="The upload to me/v4 stopped: network gone"):
        upload(converted("lossless"), "me/v4")
    first, hub.limit = list(hub.sent), 99
    assert upload(converted("lossless"), "me/v4") == "hub:me/v4"
    assert not set(first) & set(hub.sent[3:])
    assert hub.sent[-1] == "config.json"
    names = {p.name for p in converted("lossless").iterdir()}
    assert set(hub.files) == names


def test_a_conversion_is_uploaded_in_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    result = typed(TINY, "--out", tmp_path / "out", "--upload", "team/v4")
    assert "uploaded to hub:team/v4" in result.stdout
    assert set(hub.files) == {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ({"name": "me"}, "The Hub knows you as me, and team is no organisation of yours"),
        (LocalTokenNotFoundError("Token is required"), "run `hf auth login` first"),
        (ConnectionError("no route"), "Cannot ask the Hub who uploads: no route"),
    ],
)
def test_who_may_not_upload_learns_it_before_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: Any, message: str
) -> None:
    answer = Mock(side_effect=[who])
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(whoami=answer))
    result = typed(TINY, "--out", tmp_path / "out", "--upload", "team/v4")
    assert (result.exit_code, message in result.stderr) == (1, True)
    assert not (tmp_path / "out").exists()
