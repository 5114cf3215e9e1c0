"""States on disk: the right positions, resumable; corpora: the right windows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxsteer.contrast import ContrastSet
from mlxsteer.errors import ModelError, SaeError, UsageError
from mlxsteer.model import Model
from mlxsteer.sae import activations, chats, corpus
from mlxsteer.sae.corpus import Window
from tests.sae import synthetic

LAYER = 2


@pytest.fixture
def found() -> list[Window]:
    """40 windows of 5 to 12 tokens; of some the first three are left out."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 13, 40)
    return [
        Window(tuple(rng.integers(6, 64, n).tolist()), start=3 if i % 3 else 1)
        for i, n in enumerate(lengths)
    ]


def test_rows_are_the_states_of_the_kept_positions(
    tiny: Model, found: list[Window], tmp_path: Path
) -> None:
    data = activations.capture(tiny, found, LAYER, "residual", tmp_path, show_progress=False)
    rows = np.array(data.rows(np.arange(data.n_rows)))
    train, held = activations.split(found)
    order = [w for part in (train, held) for batch in activations.batched(part) for w in batch]
    at = 0
    for window in order:
        states = np.array(tiny.capture(window.tokens)["residual"][LAYER])[window.start :]
        np.testing.assert_allclose(rows[at : at + window.kept], states, rtol=2**-8, atol=1e-3)
        at += window.kept
    assert at == data.n_rows == sum(window.kept for window in found)
    assert data.n_train == sum(window.kept for window in train)
    assert data.path.stat().st_size == activations.bytes_needed(data.n_rows, tiny.d_model)


def test_an_interrupted_capture_goes_on_with_the_same_bytes(
    tiny: Model, found: list[Window], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "BATCH_TOKENS", 48)
    whole = activations.capture(tiny, found, LAYER, "residual", tmp_path / "a", show_progress=False)
    real, calls = activations.read_batch, [0]

    def dies(*args: object) -> mx.array:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(activations, "read_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        activations.capture(tiny, found, LAYER, "residual", tmp_path / "b", show_progress=False)
    assert json.loads((tmp_path / "b" / "progress.json").read_text()) == {"batches": 3}
    again = activations.capture(tiny, found, LAYER, "residual", tmp_path / "b", show_progress=False)
    assert again.path.read_bytes() == whole.path.read_bytes()
    total = len(activations.batched(found[:-1])) + 1
    assert calls[0] == 4 + total - 3


def test_every_training_row_is_seen_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    data = activations.Activations(tmp_path / "none", 4, 100, 110)
    first, second = data.train_order(0, 0), data.train_order(0, 1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, data.train_order(0, 0))
    assert list(data.held_out()) == list(range(100, 110))


def test_refuses_what_cannot_be_captured(
    tiny: Model, found: list[Window], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="out of range"):
        activations.capture(tiny, found, 99, "residual", tmp_path)
    with pytest.raises(SaeError, match="too small"):
        activations.capture(tiny, found[:1], LAYER, "residual", tmp_path)
    full = shutil._ntuple_diskusage(100, 99, 1)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(SaeError, match="fewer --tokens"):
        activations.capture(tiny, found, LAYER, "residual", tmp_path / "new")


# --- windows ----------------------------------------------------------------------------------


def test_texts_are_cut_into_windows_without_their_first_position(tiny: Model) -> None:
    text = " ".join(f"w{i % 50}" for i in range(25))
    parts = list(corpus.windows(tiny, [text], context=10))
    assert [len(w.tokens) for w in parts] == [10, 10, 5]
    assert all(w.start == 1 for w in parts)
    tokens = [token for w in parts for token in w.tokens]
    assert tokens == list(tiny.tokenizer.encode(text))


def test_chats_leave_out_what_all_of_them_begin_with(tiny: Model) -> None:
    messages = [
        {"role": "system", "content": "w1"},
        {"role": "user", "content": "w2 w3"},
        {"role": "assistant", "content": "w4 w5"},
    ]
    window = corpus.chat_window(tiny, messages, shared=1, context=100)
    decoded = tiny.tokenizer.decode(list(window.tokens))
    assert decoded.split() == "<system> w1 <end> <user> w2 w3 <end> <assistant> w4 w5".split()
    assert window.start == 1
    assert len(corpus.chat_window(tiny, messages, shared=2, context=3).tokens) == 5


def test_long_texts_are_tokenized_in_pieces_that_make_the_whole() -> None:
    text = "".join(f"line {i}\n" for i in range(3000)) + "last"
    pieces = list(corpus._pieces(text))
    assert len(pieces) > 5
    assert "".join(pieces) == text


def test_documents_come_from_text_json_lines_and_python(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain text")
    chat = [{"role": "user", "content": "Hello"}]
    lines = [json.dumps({"text": "one"}), "", json.dumps({"messages": chat})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    assert list(corpus.documents(str(tmp_path / "a.txt"))) == ["plain text"]
    assert list(corpus.documents(str(tmp_path / "b.jsonl"))) == ["one", chat]
    assert len("".join(map(str, corpus.documents(corpus.PYTHON_DOCS)))) > 400_000


def test_a_hub_data_set_is_fetched_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (tmp_path / "train.jsonl").write_text('{"text": "from the hub"}')
    asked = []

    def download(repo: str, file: str, repo_type: str) -> str:
        asked.append((repo, file, repo_type))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert list(corpus.documents("hub:me/texts/train.jsonl")) == ["from the hub"]
    assert asked == [("me/texts", "train.jsonl", "dataset")]


def test_refuses_a_corpus_that_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"body": "no"}\n')
    with pytest.raises(SaeError, match=r'bad.jsonl:2: has neither "text"'):
        list(corpus.documents(str(tmp_path / "bad.jsonl")))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(SaeError, match=r"bad.jsonl:1: no JSON"):
        list(corpus.documents(str(tmp_path / "bad.jsonl")))
    (tmp_path / "raw.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SaeError, match="not UTF-8"):
        list(corpus.documents(str(tmp_path / "raw.txt")))
    with pytest.raises(SaeError, match="cannot be read"):
        list(corpus.documents(str(tmp_path / "nowhere.txt")))
    with pytest.raises(UsageError, match="hub:owner"):
        list(corpus.documents("hub:nothing"))


def test_the_corpus_is_chosen_until_it_has_the_tokens(found: list[Window]) -> None:
    picked = corpus.chosen(found, 100, seed=1)
    kept = [window.kept for window in picked]
    assert sum(kept) >= 100 > sum(kept[:-1])
    assert corpus.chosen(found, 100, seed=1) == picked != corpus.chosen(found, 100, seed=2)
    assert len(corpus.chosen(found, 10**9, seed=1)) == len(found)


# --- the model's own chats --------------------------------------------------------------------


def test_prompts_of_chats_differ_and_their_number_has_an_end() -> None:
    prompts = [json.dumps(messages) for messages in chats.questions(1000, seed=0)]
    assert len(set(prompts)) == 1000
    with pytest.raises(SaeError, match="Ask for fewer"):
        chats.questions(10**6, seed=0)


def test_chats_that_were_written_are_not_written_again(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "AT_A_TIME", 2)
    monkeypatch.setattr(chats, "ANSWER_TOKENS", 4)
    first = chats.write(tiny, 3, tmp_path, show_progress=False)
    assert [chat[-1]["role"] for chat in first] == ["assistant"] * 3
    (tmp_path / "000002.json").unlink()
    made: list[int] = []
    real = chats.generate_batch

    def counted(model: Model, tokens: list[list[int]], *rest: object) -> object:
        made.append(len(tokens))
        return real(model, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(chats, "generate_batch", counted)
    assert chats.write(tiny, 3, tmp_path, show_progress=False) == first
    assert made == [1]


def test_massive_states_are_neither_trained_on_nor_scored(tmp_path: Path) -> None:
    data = synthetic.buffer(tmp_path / "states", rows=1000, held=100)
    bits = np.memmap(data.path, np.uint16, "r+", shape=(1000, data.d_model))
    for row in (7, 950):
        large = 100 * data.rows(np.array([row]))
        bits[row] = np.array(large.astype(mx.bfloat16).view(mx.uint16))[0]
    bits.flush()
    found = data.without_massive()
    assert found.massive == (7, 950)
    assert found.n_train == 899
    assert sorted(found.train_order(0, 0)) == [row for row in range(900) if row != 7]
    assert 950 not in found.held_out()
    assert len(found.held_out()) == 99


def test_contrast_sets_are_a_corpus_of_both_poles() -> None:
    found = list(corpus.documents(corpus.CONTRAST_SETS))
    bridge = ContrastSet.load("golden-gate")
    assert {*bridge.positive, *bridge.negative} <= {one for one in found if isinstance(one, str)}
    chats = [one for one in found if not isinstance(one, str)]
    assert all([m["role"] for m in one] == ["user", "assistant"] for one in chats)
    assert len(chats) > 100


def test_a_small_source_is_taken_whole_beside_a_large_one() -> None:
    small = [Window((1, 2, 3), 1)] * 5
    large = [Window((4, 5, 6), 1)] * 500
    found = corpus.shared_out([large, small], 100, seed=0)
    assert found.count(small[0]) == 5
    assert sum(window.kept for window in found) == 100
