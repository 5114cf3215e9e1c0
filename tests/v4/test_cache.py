"""The cache: batches, snapshots, files, growth and bytes."""

from __future__ import annotations

import copy

import mlx.core as mx
import pytest
from mlx_lm.models.cache import LRUPromptCache, load_prompt_cache, save_prompt_cache

from mlxsteer.errors import ModelError
from mlxsteer.models.deepseek_v4 import ModelArgs, cache_bytes, register, restore, snapshot
from tests.v4.tiny import EXACT, config, golden, largest, model, run, token_ids

LENGTHS = [1, 7, 130, 64]  # rows of a batch; one crosses a ratio-128 window


def row_ids(row: int, start: int, n: int) -> mx.array:
    """Tokens of a sequence of its own for each row of a batch."""
    ids = token_ids()
    return ((ids * (2 * row + 1) + row) % 64)[:, start : start + n]


def single_logits(row: int, n: int):
    return run(model(), row_ids(row, 0, n), [n])


def padded(rows: list[mx.array]) -> mx.array:
    width = max(r.shape[1] for r in rows)
    return mx.concatenate([mx.pad(r, [(0, 0), (0, width - r.shape[1])]) for r in rows])


def prefilled_batch(lengths: list[int], piece: int):
    """A batch cache after a right-padded prompt of the given lengths, in pieces."""
    built = model()
    fresh = [built.make_cache() for _ in lengths]
    cache = [layer[0].merge(list(layer)) for layer in zip(*fresh, strict=True)]
    width = max(lengths)
    ids = padded([row_ids(b, 0, n) for b, n in enumerate(lengths)])
    for c in cache:
        c.prepare(lengths=lengths, right_padding=[width - n for n in lengths])
    out = []
    for i in range(0, width, piece):
        out.append(built(ids[:, i : i + piece], cache=cache))
        mx.eval(out[-1], [c.state for c in cache])
    for c in cache:
        c.finalize()
    return cache, mx.concatenate(out, axis=1)


@pytest.mark.parametrize("piece", [200, 50, 33])
def test_padded_prefill_of_a_batch_equals_single_runs(piece):
    cache, logits = prefilled_batch(LENGTHS, piece)
    assert cache[0].positions == LENGTHS
    for b, n in enumerate(LENGTHS):
        assert largest(logits[b, :n], single_logits(b, n)) < EXACT


def test_decode_of_rows_at_different_positions_equals_single_runs():
    built = model()
    cache, _ = prefilled_batch(LENGTHS, 64)
    for step in range(10):
        ids = mx.concatenate([row_ids(b, n + step, 1) for b, n in enumerate(LENGTHS)])
        logits = built(ids, cache=cache)
        mx.eval(logits)
        if step in (0, 3, 9):
            for b, n in enumerate(LENGTHS):
                assert largest(logits[b, 0], single_logits(b, n + step + 1)[-1]) < EXACT


def test_rows_leave_and_join_a_batch_and_equal_their_single_runs():
    built = model()
    cache, _ = prefilled_batch([5, 40, 127], 64)
    late = built.make_cache()
    run(built, row_ids(7, 0, 21), [21], late)
    for c, other in zip(cache, late, strict=True):
        c.filter([0, 2])
        c.extend(other)
    at = [5, 127, 21]
    for step in range(9):
        ids = mx.concatenate([row_ids(r, n + step, 1) for r, n in zip([0, 2, 7], at, strict=True)])
        logits = built(ids, cache=cache)
    for b, (r, n) in enumerate(zip([0, 2, 7], at, strict=True)):
        assert largest(logits[b, 0], single_logits(r, n + 9)[-1]) < EXACT


def test_an_extracted_row_goes_on_alone():
    built = model()
    cache, _ = prefilled_batch([30, 9], 64)
    alone = [c.extract(1) for c in cache]
    logits = run(built, row_ids(1, 9, 12), [5, 1, 6], alone)
    assert largest(logits, single_logits(1, 21)[9:]) < EXACT
    assert cache[0].positions == [30, 9]


def test_chunks_may_go_on_from_different_positions():
    built = model()
    cache, _ = prefilled_batch([30, 9], 64)
    ids = mx.concatenate([row_ids(0, 30, 140), row_ids(1, 9, 140)])
    logits = built(ids, cache=cache)
    assert largest(logits[0], single_logits(0, 170)[30:]) < EXACT
    assert largest(logits[1], single_logits(1, 149)[9:]) < EXACT


def test_restore_takes_back_what_came_after_a_snapshot_any_number_of_times():
    built, want = model(), golden("tiny_fp32")["logits"]
    cache = built.make_cache()
    run(built, token_ids(), [126], cache)
    snap = snapshot(cache)
    for pieces in ([1] * 6, [40], [3, 1, 60]):
        other = (token_ids()[:, 126:] + 5) % 64
        run(built, other, pieces, cache)
        restore(cache, snap)
        logits = run(built, token_ids()[:, 126:], pieces, cache)
        assert largest(logits, want[126 : 126 + sum(pieces)]) < EXACT
        restore(cache, snap)
    assert cache[0].positions == [126]


def test_a_merged_or_copied_cache_does_not_feel_its_source():
    built = model()
    source = built.make_cache()
    run(built, token_ids(), [50], source)
    merged = [c.merge([c]) for c in source]
    copied = copy.deepcopy(source)
    run(built, (token_ids()[:, 50:] + 9) % 64, [1] * 6, source)
    want = golden("tiny_fp32")["logits"][50:60]
    assert largest(run(built, token_ids()[:, 50:], [1] * 10, merged), want) < EXACT
    assert largest(run(built, token_ids()[:, 50:], [1] * 10, copied), want) < EXACT


@pytest.mark.parametrize("n", [0, 2, 3, 8, 129, 133])
def test_a_saved_cache_goes_on_as_the_original(tmp_path, n):
    register()
    built = model()
    cache = built.make_cache()
    if n:
        run(built, token_ids(), [n], cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache, {"steer": "none"})
    back, metadata = load_prompt_cache(str(tmp_path / "cache.safetensors"), return_metadata=True)
    assert metadata == {"steer": "none"}
    logits = run(built, token_ids()[:, n:], [1, 1, 6, 1], back)
    assert largest(logits, golden("tiny_fp32")["logits"][n : n + 9]) < EXACT


def test_a_saved_batch_goes_on_as_the_original(tmp_path):
    register()
    built = model()
    cache, _ = prefilled_batch([30, 9], 64)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    back = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    ids = mx.concatenate([row_ids(0, 30, 1), row_ids(1, 9, 1)])
    assert largest(built(ids, cache=cache), built(ids, cache=back)) == 0


def test_a_damaged_cache_file_is_refused_by_name():
    cache = model().make_cache()
    run(model(), token_ids(), [20], cache)
    state = list(cache[2].state)
    state[6] = state[6][:, :-1]
    with pytest.raises(ModelError, match="damaged"):
        type(cache[2]).from_state(state)
    with pytest.raises(ModelError, match="not written by this version"):
        type(cache[2]).from_state(["something else", 1, 2, 3, 4, mx.array([1])])


def test_mlx_lm_prompt_cache_store_reuses_a_prefix():
    built, store = model(), LRUPromptCache()
    ids = token_ids()[0].tolist()
    cache = built.make_cache()
    run(built, token_ids(), [40], cache)
    store.insert_cache("m", ids[:40], cache)
    found, rest = store.fetch_nearest_cache("m", ids[:60])
    assert rest == ids[40:60]
    logits = run(built, mx.array(rest)[None], [20], found)
    assert largest(logits, golden("tiny_fp32")["logits"][40:60]) < EXACT
    assert not any(c.is_trimmable() for c in cache)


def test_a_batch_of_another_size_is_refused():
    cache = model().make_cache()
    run(model(), token_ids(), [4], cache)
    with pytest.raises(ModelError, match="holds 1 rows and the input has 2"):
        model()(mx.zeros((2, 1), dtype=mx.int32), cache=cache)


@pytest.mark.parametrize("T", [0, 3, 4, 127, 128, 131, 300])
def test_bytes_in_use_follow_the_formula(T):
    built = model()
    cache = built.make_cache()
    run(built, token_ids(), [T or 1], cache)
    used = sum(c.extract(0).nbytes for c in cache)
    assert used == cache_bytes(built.args, T or 1, itemsize=4).total


def flash_args() -> ModelArgs:
    """The real V4-Flash's sizes (spec A.1)."""
    return ModelArgs.from_dict(
        config("tiny_fp32")
        | {
            "num_hidden_layers": 43,
            "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "head_dim": 512,
            "qk_rope_head_dim": 64,
            "o_groups": 8,
            "index_head_dim": 128,
            "index_topk": 512,
            "sliding_window": 128,
        }
    )


@pytest.mark.parametrize(
    ("T", "rows", "keys"),
    [
        (4096, 22_675_456, 5_505_024),
        (131_072, 725_614_592, 176_160_768),
        (1_048_576, 5_804_916_736, 1_409_286_144),
    ],
)
def test_the_real_model_needs_6880_bytes_per_token(T, rows, keys):
    b = cache_bytes(flash_args(), T)
    assert (b.window, b.rows, b.index_keys) == (5_636_096, rows, keys)
    assert b.open_windows == 10_485_760 + 1_032_192 + 258_048
    assert (b.rows + b.index_keys) == 6880 * T


def test_a_million_tokens_take_6_7_gib():
    b = cache_bytes(flash_args(), 1_048_576)
    assert b.window + b.rows + b.index_keys == 7_219_838_976


def test_room_grows_by_an_eighth_and_not_per_window():
    from mlxsteer.models.deepseek_v4.cache import CacheShape, DeepseekV4Cache

    cache = DeepseekV4Cache(CacheShape(4, 8, 16, 16))
    copies, before = 0, None
    for T in range(0, 40_000, 4):
        cache.positions = [T] if T else []
        cache.begin(cache.span(1, 4))
        copies += cache.kv.shape != before
        before = cache.kv.shape
    assert copies < 40
    assert cache.capacity < 10_000 * 9 / 8 + 65


def test_a_step_writes_rows_in_place():
    """Once room is there, the buffer of a layer is the same memory from step to step."""
    built = model()
    cache = built.make_cache()
    run(built, token_ids(), [30], cache)
    shapes = [c.kv.shape for c in cache]
    run(built, token_ids()[:, 30:], [1] * 20, cache)
    assert [c.kv.shape for c in cache] == shapes
