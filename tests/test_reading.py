"""Reading through shared prefixes, in batches and in pieces, gives what one forward pass gives.

The reference is `Model.capture` of one sequence at a time: no cache, no padding, no batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlxsteer
from mlxsteer import reading
from mlxsteer.errors import ModelError
from mlxsteer.model import Model
from mlxsteer.reading import Group, Passage, group_by_prefix, read
from tests.chat_models import chat_folder

LAYERS = (1, 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return mlxsteer.load(str(chat_folder(tmp_path_factory.mktemp("models") / "tiny")))


def last(*tokens: int) -> Passage:
    """A passage read at its last token."""
    return Passage(tokens, {"last": (len(tokens) - 1, len(tokens))})


def questions(count: int = 6, prefix: int = 30) -> list[Passage]:
    """Passages of several lengths that share a beginning, each with two spans."""
    rng = np.random.default_rng(0)
    begin = rng.integers(0, 64, prefix).tolist()
    passages = []
    for index in range(count):
        prompt = [*begin, *rng.integers(0, 64, 3 + index).tolist()]
        answer = rng.integers(0, 64, 2 + index % 3).tolist()
        end = len(prompt) + len(answer)
        spans = {"prompt": (len(prompt) - 1, len(prompt)), "answer": (len(prompt), end)}
        passages.append(Passage((*prompt, *answer), spans))
    return passages


def one_by_one(model: Model, passages: Sequence[Passage], span: str, site: str) -> np.ndarray:
    """float32 [N, layers, D]: means over a span of states from separate forward passes."""
    means = []
    for passage in passages:
        states = np.array(model.capture(passage.tokens, [site])[site])[list(LAYERS)]
        start, end = passage.spans[span]
        means.append(states[:, start:end].mean(axis=1))
    return np.stack(means)


def reading_of(model: Model, passages: Sequence[Passage], **options: Any) -> reading.Readings:
    given: dict[str, Any] = {"layers": LAYERS, "site": "residual", **options}
    return read(model, passages, label="", show_progress=False, **given)


# --- what is read ---------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["residual", "attn_out", "ffn_out"])
def test_shared_prefixes_change_nothing(tiny, site):
    passages = questions()
    found = reading_of(tiny, passages, site=site)
    assert found.tokens_run < found.tokens_given  # a prefix was shared
    for span in ("prompt", "answer"):
        expected = one_by_one(tiny, passages, span, site)
        np.testing.assert_allclose(found.means[span], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma3_text", "mamba2", "qwen3_next"])
def test_models_whose_caches_cannot_be_copied_are_read_in_plain_batches(family, tmp_path):
    model = mlxsteer.load(str(chat_folder(tmp_path / family, family)))
    passages = questions()
    found = reading_of(model, passages)
    assert found.tokens_run == found.tokens_given
    expected = one_by_one(model, passages, "answer", "residual")
    np.testing.assert_allclose(found.means["answer"], expected, atol=2e-5, rtol=1e-4)


def test_span_weights_average_each_rows_span_behind_the_prefix():
    weights = reading._span_weights([(3, 5), (4, 8)], prefix=2, length=6)
    assert weights.tolist() == [[0, 0.5, 0.5, 0, 0, 0], [0, 0, 0.25, 0.25, 0.25, 0.25]]
    assert weights[:, 1:3].dtype == np.float32


def test_results_stand_in_the_order_of_the_passages(tiny):
    passages = questions()
    forward = reading_of(tiny, passages).means["prompt"]
    backward = reading_of(tiny, passages[::-1]).means["prompt"]
    np.testing.assert_allclose(forward, backward[::-1], atol=1e-5)


def test_a_place_that_the_model_lacks_is_refused_before_any_work(tiny):
    with pytest.raises(ModelError, match="Layer 9 is out of range"):
        reading_of(tiny, questions(), layers=(9,))
    with pytest.raises(ModelError, match="Unknown site 'residuals'"):
        reading_of(tiny, questions(), site="residuals")


class Unevaluable(nn.Module):
    """Joins the graph, and fails when it is evaluated: MLX has no half-precision gather_mm here."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array) -> mx.array:
        square = mx.zeros((1, 2, 2), mx.bfloat16)
        trap = mx.gather_mm(square, square, mx.array([0]), mx.array([0]))
        return self.inner(x) + trap.astype(mx.float32).sum()


@pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="the trap is one of the CPU backend"
)
def test_layers_above_the_highest_needed_are_never_evaluated(tmp_path):
    model = mlxsteer.load(str(chat_folder(tmp_path / "tiny")))
    expected = reading_of(model, questions())
    blocks: Any = model.network.layers
    blocks[3].self_attn.k_proj = Unevaluable(blocks[3].self_attn.k_proj)
    blocks[3].mlp.down_proj = Unevaluable(blocks[3].mlp.down_proj)
    again = reading_of(model, questions())  # layers 1 and 2, through a prefix cache
    assert (again.means["answer"] == expected.means["answer"]).all()
    with pytest.raises(RuntimeError, match="GatherMM"):
        reading_of(model, questions(), layers=(1, 2, 3))


# --- groups ---------------------------------------------------------------------------------


def cost(passages: Sequence[Passage], group: Group) -> int:
    """Positions run, padding included, and the overhead of each pass."""
    longest = max(len(passages[member].tokens) for member in group.members)
    passes = 2 if group.prefix else 1
    positions = group.prefix + len(group.members) * (longest - group.prefix)
    return positions + passes * reading.PASS_OVERHEAD


def best_partition(passages: Sequence[Passage]) -> int:
    """The least cost over every way to cut the sorted passages into runs."""
    order = sorted(range(len(passages)), key=lambda i: (passages[i].tokens, i))
    gaps = len(order) - 1
    return min(
        sum(cost(passages, reading._group(passages, run, True)) for run in _runs(order, cuts))
        for cuts in itertools.product([False, True], repeat=gaps)
    )


def _runs(order: Sequence[int], cuts: Sequence[bool]) -> Iterator[list[int]]:
    run = [order[0]]
    for cut, member in zip(cuts, order[1:], strict=True):
        if cut:
            yield run
            run = []
        run.append(member)
    yield run


TEXTS = st.lists(
    st.tuples(
        st.integers(0, 60), st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 4)
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS)
def test_groups_cover_every_passage_once_share_a_true_prefix_and_cost_the_least(texts):
    passages = []
    for same, own, read_last in texts:
        tokens = (*[7] * same, *own)
        passages.append(Passage(tokens, {"last": (max(0, len(tokens) - read_last), len(tokens))}))
    groups = group_by_prefix(passages)
    members = [member for group in groups for member in group.members]
    assert sorted(members) == list(range(len(passages)))
    for group in groups:
        first = passages[group.members[0]].tokens[: group.prefix]
        for member in group.members:
            assert passages[member].tokens[: group.prefix] == first
            assert group.prefix <= passages[member].free_prefix
    assert sum(cost(passages, group) for group in groups) == best_partition(passages)


def test_tokens_are_counted_as_run(tiny):
    begin = range(40)
    passages = [last(*begin, 50 + index) for index in range(4)]
    assert group_by_prefix(passages) == [Group((0, 1, 2, 3), 40)]
    found = reading_of(tiny, passages)
    assert (found.tokens_run, found.tokens_given) == (40 + 4, 4 * 41)


def test_two_families_of_prompts_make_two_groups():
    passages = [last(*[family] * 60, 2, index) for index in range(3) for family in (0, 1)]
    groups = group_by_prefix(passages)
    assert {group.members: group.prefix for group in groups} == {(0, 2, 4): 61, (1, 3, 5): 61}


def test_a_prefix_too_short_to_pay_for_its_pass_is_not_split_off():
    passages = [last(1, 2, 3, index) for index in range(3)]
    [group] = group_by_prefix([*passages])
    assert len(group.members) == 3
    alone = group_by_prefix([last(*range(50))])
    assert alone == [Group((0,), 0)]


def test_a_read_position_is_never_inside_the_prefix():
    passages = [Passage(tuple(range(50)), {"early": (10, 12)})] * 5
    assert all(group.prefix <= 10 for group in group_by_prefix(passages))


def test_a_group_never_exceeds_the_batch_limit(monkeypatch):
    monkeypatch.setattr(reading, "MAX_BATCH_TOKENS", 100)
    passages = [last(*[index] * 30) for index in range(10)]
    assert max(len(group.members) for group in group_by_prefix(passages)) == 3


# --- interruption ---------------------------------------------------------------------------


def in_groups(monkeypatch: pytest.MonkeyPatch) -> list[Passage]:
    """Passages that are read in several groups."""
    monkeypatch.setattr(reading, "MAX_BATCH_TOKENS", 24)
    passages = questions(8)
    assert len(group_by_prefix(passages)) >= 4
    return passages


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[Group]:
    """Groups that were run from now on; Ctrl-C after `stop_after` of them."""
    run: list[Group] = []
    original = reading._run_group

    def run_group(model: Any, passages: Any, group: Group, *rest: Any) -> Any:
        if len(run) == stop_after:
            raise KeyboardInterrupt
        run.append(group)
        return original(model, passages, group, *rest)

    monkeypatch.setattr(reading, "_run_group", run_group)
    return run


def interrupt(model: Model, passages: list[Passage], store: Path, after: int) -> list[Group]:
    with pytest.MonkeyPatch.context() as patch:
        done = counted(patch, stop_after=after)
        with pytest.raises(KeyboardInterrupt):
            reading_of(model, passages, store=store)
    return done


def test_an_interrupted_reading_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    passages, store = in_groups(monkeypatch), tmp_path / "store"
    whole = reading_of(tiny, passages)
    done = interrupt(tiny, passages, store, after=2)
    assert len(list(store.iterdir())) == 2
    rest = counted(monkeypatch)
    again = reading_of(tiny, passages, store=store)
    assert set(rest).isdisjoint(done)
    assert set(rest) | set(done) == set(group_by_prefix(passages))
    for span, means in whole.means.items():
        assert (again.means[span] == means).all()
    assert again.tokens_run == whole.tokens_run
    assert not store.exists()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(bytes(data))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _other_shape(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, answer=np.zeros((1, 1, 1)), prompt=np.zeros((1, 1, 1)))


def _pickle(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, answer=np.array([{}], dtype=object))


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _other_shape, _pickle])
def test_a_damaged_part_is_read_again(tiny, tmp_path, monkeypatch, damage):
    passages, store = in_groups(monkeypatch), tmp_path / "store"
    whole = reading_of(tiny, passages)
    interrupt(tiny, passages, store, after=2)
    damage(sorted(store.iterdir())[0])
    rest = counted(monkeypatch)
    again = reading_of(tiny, passages, store=store)
    assert len(rest) == len(group_by_prefix(passages)) - 1
    assert (again.means["answer"] == whole.means["answer"]).all()


def test_parts_of_another_grouping_are_not_mistaken_for_these(tiny, tmp_path, monkeypatch):
    passages, store = in_groups(monkeypatch), tmp_path / "store"
    interrupt(tiny, passages, store, after=2)
    monkeypatch.setattr(reading, "MAX_BATCH_TOKENS", 40)
    again = reading_of(tiny, passages, store=store)
    expected = one_by_one(tiny, passages, "answer", "residual")
    np.testing.assert_allclose(again.means["answer"], expected, atol=1e-5, rtol=1e-5)
