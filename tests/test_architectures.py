"""Steering through mlx-lm's own decoder families, on tiny random float32 models of each."""

from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlxsteer import ops
from mlxsteer.edits import Stacker
from mlxsteer.errors import ModelError
from mlxsteer.models import adapters
from mlxsteer.models.hooks import ATTN_OUT, FFN_OUT, RESIDUAL, Hooks, Run
from mlxsteer.plan import PROMPT
from mlxsteer.rows import Control, Row
from mlxsteer.steered import SteeredModel
from tests.tiny_models import (
    HIDDEN,
    random_vector,
    tiny_model,
    tiny_plan,
    tiny_tokens,
)

TWO_WRITERS = (
    "llama", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss", "mistral3", "glm4", "phi3",
    "deepseek_v3", "qwen3_next", "gemma2", "olmo2", "cohere", "granite", "lfm2", "hunyuan", "gptj",
)  # fmt: skip
ONE_WRITER = ("mamba2", "nemotron_h")
FAMILIES = (*TWO_WRITERS, *ONE_WRITER, "rwkv7")
WRITES_TIMES = {"granite": 0.22}  # the block adds this multiple of its writers' outputs
REFUSED = {"gemma3n": "not one stream", "iquestloopcoder": "never calls its blocks"}
BATCHED = ("llama", "gemma3_text", "qwen3_moe", "qwen3_next")
LAYERS = 4

per_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def hooked(family: str) -> Hooks:
    return adapters.install(tiny_model(family))


def run(hooks: Hooks, tokens: mx.array, edits=None, sites=(RESIDUAL,)):
    """(logits, {place: capture}) of a cache-less pass."""
    places = {(layer, site) for layer in range(LAYERS) for site in sites}
    hooks.require(places)
    passing = Run(edits=edits or {}, capture=frozenset(places))
    with hooks.forward(passing):
        logits = hooks.model(tokens, cache=None)
    mx.eval(logits, passing.captured)
    return logits, passing.captured


def unit_vector(seed: int = 5) -> mx.array:
    return mx.random.normal((HIDDEN,), key=mx.random.key(seed))


def distance(a: mx.array, b: mx.array) -> float:
    """Largest absolute difference, in units of the second's largest element."""
    return float(mx.abs(a - b).max() / mx.abs(b).max())


def decode(steered: SteeredModel, row: Row, prompt: list[int], count: int):
    """(tokens, logprobs [count, V]) of one sequence, greedy, through mlx-lm's generate_step."""
    cache = steered.new_cache(row)
    steps = list(generate_step(mx.array(prompt), steered, max_tokens=count, prompt_cache=cache))
    return [token for token, _ in steps], mx.stack([logprobs for _, logprobs in steps])


# --- sites --------------------------------------------------------------------------------------


@per_family
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_residual_add_moves_that_layer_by_the_vector_and_nothing_before(family, layer):
    hooks, tokens, v = hooked(family), tiny_tokens(2, 7), unit_vector()
    before, plain = run(hooks, tokens)
    after, moved = run(hooks, tokens, {(layer, RESIDUAL): partial(ops.add, shift=v)})
    at = (layer, RESIDUAL)
    assert mx.allclose(moved[at] - plain[at], v, atol=1e-5 * float(mx.abs(plain[at]).max() + 1))
    for earlier in range(layer):
        assert mx.array_equal(moved[earlier, RESIDUAL], plain[earlier, RESIDUAL])
    for later in range(layer + 1, LAYERS):
        assert distance(moved[later, RESIDUAL], plain[later, RESIDUAL]) > 1e-3
    assert distance(after, before) > 1e-3


@pytest.mark.parametrize("family", TWO_WRITERS)
def test_tapped_writers_are_what_the_block_adds(family):
    hooks = hooked(family)
    _, seen = run(hooks, tiny_tokens(2, 9, seed=3), sites=(RESIDUAL, ATTN_OUT, FFN_OUT))
    times = WRITES_TIMES.get(family, 1.0)
    for layer in range(1, LAYERS):
        x, out = seen[layer - 1, RESIDUAL], seen[layer, RESIDUAL]
        written = times * (seen[layer, ATTN_OUT] + seen[layer, FFN_OUT])
        assert distance(x + written, out) < 1e-5


@pytest.mark.parametrize("family", ONE_WRITER)
def test_the_single_writer_of_a_block_is_what_it_adds(family):
    hooks = hooked(family)
    site_of = [hooks.sites_of(layer)[1] for layer in range(LAYERS)]
    places = {(layer, site_of[layer]) for layer in range(LAYERS)}
    passing = Run(capture=frozenset(places | {(layer, RESIDUAL) for layer in range(LAYERS)}))
    with hooks.forward(passing):
        hooks.model(tiny_tokens(2, 9), cache=None)
    seen = passing.captured
    for layer in range(1, LAYERS):
        x, out = seen[layer - 1, RESIDUAL], seen[layer, RESIDUAL]
        assert distance(x + seen[layer, site_of[layer]], out) < 1e-5


def test_feed_forward_blocks_of_a_hybrid_offer_ffn_out():
    assert [hooked("nemotron_h").sites_of(layer)[1] for layer in range(LAYERS)] == [
        ATTN_OUT, FFN_OUT, ATTN_OUT, FFN_OUT,
    ]  # fmt: skip


@per_family
@pytest.mark.parametrize("site", [ATTN_OUT, FFN_OUT])
def test_writer_sites_respond_with_the_written_multiple_of_the_vector(family, site):
    hooks, tokens, v = hooked(family), tiny_tokens(1, 7), unit_vector()
    offering = [layer for layer in range(LAYERS) if site in hooks.sites_of(layer)]
    if not offering:
        pytest.skip(f"{family} has no {site}")
    layer = offering[-1]
    before, plain = run(hooks, tokens)
    after, moved = run(hooks, tokens, {(layer, site): partial(ops.add, shift=v)})
    change = moved[layer, RESIDUAL] - plain[layer, RESIDUAL]
    assert distance(after, before) > 1e-3
    if site == FFN_OUT:  # nothing of the block comes after it
        expected = mx.broadcast_to(WRITES_TIMES.get(family, 1.0) * v, change.shape)
        assert mx.allclose(change, expected, atol=1e-4)
    if layer:
        assert mx.array_equal(moved[layer - 1, RESIDUAL], plain[layer - 1, RESIDUAL])


@per_family
def test_each_layers_own_direction_lands_at_that_layer_only(family):
    hooks, tokens = hooked(family), tiny_tokens(1, 5)
    vector = random_vector(1)
    plan = tiny_plan(hooks, ("1r@all", vector))
    edits = Stacker().edits([plan], np.full(tokens.shape, PROMPT))
    landed = {}

    def spy(place, edit):
        def spied(x):
            landed[place] = edit(x) - x
            return edit(x)

        return spied

    run(hooks, tokens, {place: spy(place, edit) for place, edit in edits.items()})
    assert sorted(landed) == [(layer, RESIDUAL) for layer in range(LAYERS)]
    for (layer, _), change in landed.items():
        wanted = vector.magnitude[layer] * vector.directions[layer]
        assert np.allclose(np.array(change)[0], wanted, atol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_without_one_stream_is_refused_by_name(family):
    hooks = hooked(family)
    with pytest.raises(ModelError, match=f"Cannot steer {family}: .*{REFUSED[family]}"):
        hooks.require([(0, RESIDUAL)])


# --- no steering is the model itself ------------------------------------------------------------


@per_family
def test_no_steering_is_bit_identical_to_a_model_that_was_never_hooked(family):
    hooks, tokens = hooked(family), tiny_tokens(2, 8)
    hooks.writers()
    untouched = tiny_model(family)(tokens, cache=None)
    assert mx.array_equal(hooks.model(tokens, cache=None), untouched)
    zero = tiny_plan(hooks, ("0", random_vector(1)))
    edits = Stacker().edits([zero, None], np.full(tokens.shape, PROMPT))
    with hooks.forward(Run(edits=edits)):
        assert mx.array_equal(hooks.model(tokens, cache=None), untouched)
    with hooks.forward(None):
        assert mx.array_equal(hooks.model(tokens, cache=None), untouched)


@per_family
def test_hooks_leave_parameters_saving_and_loading_as_they_were(family, tmp_path):
    hooks, plain = hooked(family), tiny_model(family, seed=9)
    hooks.writers()
    names = [name for name, _ in tree_flatten(hooks.model.parameters())]
    assert names == [name for name, _ in tree_flatten(plain.parameters())]
    hooks.model.save_weights(str(tmp_path / "model.safetensors"))
    plain.load_weights(str(tmp_path / "model.safetensors"))
    tokens = tiny_tokens(1, 6)
    assert mx.array_equal(plain(tokens, cache=None), hooks.model(tokens, cache=None))


@per_family
def test_a_model_quantised_after_hooking_is_still_steered(family):
    model = tiny_model(family)
    hooks = adapters.install(model)
    hooks.writers()

    def divisible(_, module):
        return isinstance(module, nn.Linear) and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, group_size=32, bits=8, class_predicate=divisible)
    assert any(isinstance(module, nn.QuantizedLinear) for module in model.modules())
    tokens, v = tiny_tokens(1, 5), unit_vector()
    _, plain = run(hooks, tokens)
    _, moved = run(hooks, tokens, {(1, RESIDUAL): partial(ops.add, shift=v)})
    change = moved[1, RESIDUAL] - plain[1, RESIDUAL]
    assert mx.allclose(change, mx.broadcast_to(v, change.shape), atol=1e-4)


# --- rows ---------------------------------------------------------------------------------------


def row_plans(hooks: Hooks):
    """Four rows: added, none, two vectors, projected."""
    removing = random_vector(3, op="project")
    return [
        tiny_plan(hooks, ("0.2r@all", random_vector(1))),
        None,
        tiny_plan(hooks, ("-0.2r@all", random_vector(1)), ("0.1r@prompt", random_vector(2))),
        tiny_plan(hooks, ("1@all", removing)),
    ]


@per_family
def test_a_batch_of_steered_rows_equals_single_runs(family):
    hooks, tokens = hooked(family), tiny_tokens(4, 6)
    plans, phases = row_plans(hooks), np.full((4, 6), PROMPT)
    batch, _ = run(hooks, tokens, Stacker().edits(plans, phases))
    plain, _ = run(hooks, tokens)
    assert mx.array_equal(batch[1], plain[1])
    for index, plan in enumerate(plans):
        edits = Stacker().edits([plan], phases[:1])
        single, _ = run(hooks, tokens[index : index + 1], edits)
        assert distance(batch[index], single[0]) < 1e-5
        assert plan is None or distance(batch[index], plain[index]) > 1e-3


@per_family
def test_chunked_prefill_equals_one_pass(family):
    hooks = hooked(family)
    steered, tokens = SteeredModel(hooks), tiny_tokens(1, 12)
    plan = tiny_plan(hooks, ("0.5r", random_vector(1)))

    def prefill(*cuts: int) -> mx.array:
        cache, logits = steered.new_cache(Row(Control(plan), 12)), None
        for start, end in zip((0, *cuts), (*cuts, 12), strict=True):
            logits = steered(tokens[:, start:end], cache=cache)
        return logits[0, -1]

    whole = prefill()
    plain = hooks.model(tokens, cache=make_prompt_cache(hooks.model))[0, -1]
    assert distance(whole, plain) > 1e-3
    for cuts in ((5,), (4, 8), (11,)):
        assert distance(prefill(*cuts), whole) < 2e-5


@pytest.mark.parametrize("family", BATCHED)
def test_batch_generator_gives_every_row_its_single_run(family):
    """Rows of other lengths and plans, that leave at other times, with some inserted later."""
    hooks = hooked(family)
    steered = SteeredModel(hooks)
    plans = [*row_plans(hooks), tiny_plan(hooks, ("0.6r", random_vector(4))), None]
    prompts = [tiny_tokens(1, 4 + 3 * i, seed=i)[0].tolist() for i in range(len(plans))]
    counts = [9, 4, 12, 7, 10, 6]
    generator = BatchGenerator(steered, completion_batch_size=4, prefill_batch_size=2)
    found: dict[int, list] = {}
    uids: list[int] = []

    def insert(rows: range) -> None:
        caches = [steered.new_cache(Row(Control(plans[i]), len(prompts[i]))) for i in rows]
        uids.extend(
            generator.insert([prompts[i] for i in rows], [counts[i] for i in rows], caches=caches)
        )

    insert(range(4))
    late = False
    while responses := generator.next_generated():
        for response in responses:
            found.setdefault(response.uid, []).append((response.token, response.logprobs))
        if not late and any(response.finish_reason for response in responses):
            insert(range(4, 6))
            late = True
    generator.close()
    for index, uid in enumerate(uids):
        row = Row(Control(plans[index]), len(prompts[index]))
        tokens, logprobs = decode(steered, row, prompts[index], counts[index])
        assert [token for token, _ in found[uid]] == tokens
        assert mx.allclose(mx.stack([p for _, p in found[uid]]), logprobs, atol=1e-4)


# --- finding writers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
def test_writers_are_the_same_in_half_precision(family, dtype):
    half = adapters.install(tiny_model(family, dtype=dtype))
    assert half.writers() == hooked(family).writers()


def test_a_sink_at_the_first_position_does_not_fool_the_search():
    """One position writes 1,000 times the rest, so by its norm any pair with `mlp` would pass."""
    model = tiny_model("llama")

    class SinkMLP(type(model.layers[0].mlp)):
        def __call__(self, x):
            return super().__call__(x) * mx.array([3e4] + [1.0] * (x.shape[1] - 1))[:, None]

    for layer in model.layers:
        layer.mlp.__class__ = SinkMLP
    names = {(found.attn, found.ffn) for found in adapters.install(model).writers()}
    assert names == {("self_attn", "mlp")}


def test_a_loud_writer_does_not_hide_that_there_are_three():
    class Block(nn.Module):
        use_sliding = False

        def __init__(self):
            super().__init__()
            self.mixer, self.attn, self.mlp = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
            self.mixer.weight = 1e5 * self.mixer.weight

        def __call__(self, x, mask=None, cache=None):
            h = mx.tanh(x)
            return x + self.mixer(h) + self.attn(h) + self.mlp(h)

    model = tiny_model("llama")
    model.model.layers = [Block() for _ in range(LAYERS)]
    assert {adapters.install(model).sites_of(layer) for layer in range(LAYERS)} == {(RESIDUAL,)}


def test_installing_twice_gives_the_same_hooks():
    model = tiny_model("llama")
    first = adapters.install(model)
    assert adapters.install(model) is first
