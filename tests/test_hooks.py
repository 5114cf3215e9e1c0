"""Sites: what a run reads and edits, in which thread, and what the hooks cost."""

import io
import threading
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxsteer import ops
from mlxsteer.edits import Stacker
from mlxsteer.errors import ModelError
from mlxsteer.models import adapters
from mlxsteer.models.hooks import ATTN_OUT, FFN_OUT, RESIDUAL, Run
from mlxsteer.plan import PROMPT
from mlxsteer.rows import Control, Row
from mlxsteer.steered import SteeredModel
from tests.tiny_models import HIDDEN, random_vector, tiny_model, tiny_plan, tiny_tokens

LAYERS = 4


def primitives(*outputs: mx.array) -> int:
    """Operations in the graph of unevaluated `outputs`."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    return text.getvalue().count("shape=rectangle")


def prefilled(steered: SteeredModel, plans: list) -> list:
    """A cache of one or more rows with a prompt of three tokens in it, evaluated."""
    caches = [steered.new_cache(Row(Control(plan), 3)) for plan in plans]
    cache = caches[0]
    if len(caches) > 1:
        cache = [entry.merge([c[i] for c in caches]) for i, entry in enumerate(caches[0])]
    mx.eval(steered(tiny_tokens(len(plans), 3), cache=cache), [entry.state for entry in cache])
    return cache


def decode_primitives(model: nn.Module, plans: list) -> int:
    """Graph operations of one decode step through the steered model, the edits at hand."""
    steered = SteeredModel(adapters.install(model))
    cache = prefilled(steered, plans)
    tokens = tiny_tokens(len(plans), 1)
    mx.eval(steered(tokens, cache=cache), [entry.state for entry in cache])
    return primitives(steered(tokens, cache=cache))


# --- runs ---------------------------------------------------------------------------------------


def test_a_run_without_edits_captures_what_an_edited_run_starts_from():
    hooks, tokens = adapters.install(tiny_model("llama")), tiny_tokens(2, 5)
    reading = Run(capture=frozenset({(1, RESIDUAL)}))
    with hooks.forward(reading):
        hooks.model(tokens)
    assert list(reading.captured) == [(1, RESIDUAL)]
    captured = reading.captured[1, RESIDUAL]
    assert captured.shape == (2, 5, HIDDEN)
    assert captured.dtype == mx.float32


def test_captures_are_read_after_the_edit_and_in_float32():
    hooks = adapters.install(tiny_model("llama", dtype=mx.bfloat16))
    run = Run(
        edits={(2, RESIDUAL): lambda x: mx.full(x.shape, 3.0, x.dtype)},
        capture=frozenset({(2, RESIDUAL)}),
    )
    with hooks.forward(run):
        hooks.model(tiny_tokens(1, 4))
    assert run.captured[2, RESIDUAL].dtype == mx.float32
    assert (run.captured[2, RESIDUAL] == 3).all()


def test_a_run_ends_with_its_block_and_runs_nest():
    hooks, tokens = adapters.install(tiny_model("llama")), tiny_tokens(1, 4)
    plain = hooks.model(tokens)
    edited = Run(edits={(0, RESIDUAL): lambda x: x + 1})
    with hooks.forward(edited):
        with hooks.forward(None):
            assert mx.array_equal(hooks.model(tokens), plain)
        assert not mx.array_equal(hooks.model(tokens), plain)
    assert mx.array_equal(hooks.model(tokens), plain)


def test_a_failed_pass_leaves_no_run_behind():
    hooks = adapters.install(tiny_model("llama"))

    def fail(x: mx.array) -> mx.array:
        raise RuntimeError("broken edit")

    with pytest.raises(RuntimeError), hooks.forward(Run(edits={(0, RESIDUAL): fail})):
        hooks.model(tiny_tokens(1, 2))
    assert hooks.model(tiny_tokens(1, 2)).shape[1] == 2


def test_a_run_of_one_thread_is_not_felt_in_another():
    hooks, seen = adapters.install(tiny_model("llama")), []
    x = mx.ones((1, 1, HIDDEN))
    with hooks.forward(Run(edits={(0, RESIDUAL): lambda x: x + 1})):
        other = threading.Thread(target=lambda: seen.append(hooks.board.apply(0, RESIDUAL, x)))
        other.start()
        other.join()
        assert hooks.board.apply(0, RESIDUAL, x) is not x
    assert seen[0] is x


def test_a_block_that_returns_a_tuple_keeps_the_rest_of_it():
    class Block(nn.Module):
        def __call__(self, x):
            return x * 2, "state", x

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Block()]

        def __call__(self, x):
            return self.layers[0](x)

    model, x = Stack(), mx.ones((1, 2, 3))
    hooks = adapters.install(model)
    with hooks.forward(Run(edits={(0, RESIDUAL): lambda x: x + 1})):
        out, state, last = model(x)
    assert (out == 3).all()
    assert state == "state"
    assert last is x


# --- refusals -----------------------------------------------------------------------------------


def test_layers_and_sites_that_are_not_there_are_named():
    hooks = adapters.install(tiny_model("mamba2"))
    hooks.require([(0, RESIDUAL), (3, ATTN_OUT)])
    with pytest.raises(ModelError, match=r"Layer 4 is out of range: mamba2 has layers 0 to 3"):
        hooks.require([(4, RESIDUAL)])
    with pytest.raises(ModelError, match=r"Layer 1 of mamba2 offers no site 'ffn_out'"):
        hooks.require([(1, FFN_OUT)])
    with pytest.raises(ModelError, match=r"Unknown site 'resid'"):
        hooks.require([(0, "resid")])


def test_a_model_without_layers_or_with_one_layer_at_two_depths_is_refused():
    class Bare(nn.Module):
        model_type = "bare"

    with pytest.raises(ModelError, match="Cannot steer bare: it exposes no list"):
        adapters.install(Bare())
    looped = tiny_model("llama")
    looped.model.layers[2] = looped.model.layers[1]
    with pytest.raises(ModelError, match="Cannot steer llama: it uses one layer object"):
        adapters.install(looped)


def test_blocks_that_pass_a_second_stream_on_are_refused():
    """The next block would read the old second stream, so an edit would act in half."""

    class Block(nn.Module):
        def __call__(self, x, normed=None):
            out = x + (normed if normed is not None else x)
            return out, out * 0.5

    class TwoStreams(nn.Module):
        model_type = "two_streams"

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(64, 8)
            self.layers = [Block(), Block()]

        def __call__(self, tokens):
            x, normed = self.embed(tokens), None
            for layer in self.layers:
                x, normed = layer(x, normed)
            return x

    with pytest.raises(ModelError, match=r"Cannot steer two_streams: .*second stream"):
        adapters.install(TwoStreams()).require([(0, RESIDUAL)])


def test_a_model_whose_probe_fails_is_refused_with_the_reason():
    model = tiny_model("llama")

    class Broken(type(model.layers[0].mlp)):
        def __call__(self, x):
            raise ValueError("no kernel")

    model.layers[1].mlp.__class__ = Broken
    with pytest.raises(ModelError, match=r"five tokens failed \(ValueError: no kernel\)"):
        adapters.install(model).require([(0, RESIDUAL)])
    assert type(model.layers[0]).__name__ == "TransformerBlock"


# --- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_an_unsteered_decode_has_no_extra_primitive(dtype):
    model, untouched = tiny_model("llama", dtype=dtype), tiny_model("llama", dtype=dtype)
    cache, tokens = make_prompt_cache(untouched), tiny_tokens(1, 1)
    mx.eval(untouched(tiny_tokens(1, 3), cache=cache), [entry.state for entry in cache])
    mx.eval(untouched(tokens, cache=cache), [entry.state for entry in cache])
    plain = primitives(untouched(tokens, cache=cache))
    adapters.install(model).writers()
    assert decode_primitives(model, [None]) == plain


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("vectors", [1, 5])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_added_vectors_cost_one_primitive_per_layer_whatever_their_number(dtype, vectors, rows):
    model = tiny_model("llama", dtype=dtype)
    hooks = adapters.install(model)
    terms = [("0.1r", random_vector(seed)) for seed in range(vectors)]
    plans = [tiny_plan(hooks, *terms), None, tiny_plan(hooks, terms[0])][:rows]
    extra = decode_primitives(model, plans) - decode_primitives(model, [None] * rows)
    assert extra == LAYERS


def test_a_vector_at_two_sites_costs_one_primitive_at_each():
    model = tiny_model("llama")
    hooks = adapters.install(model)
    both = tiny_plan(hooks, ("0.1r", random_vector(1)), ("0.1r", random_vector(2, site="ffn_out")))
    assert decode_primitives(model, [both]) - decode_primitives(model, [None]) == 2 * LAYERS


def test_a_projection_adds_what_its_formula_needs():
    """h − s·d·(d·h): multiply, sum, scale, multiply, subtract, and views that broadcast."""
    model = tiny_model("llama")
    plan = tiny_plan(adapters.install(model), ("1", random_vector(1, op="project")))
    extra = decode_primitives(model, [plan]) - decode_primitives(model, [None])
    assert 5 * LAYERS <= extra <= 8 * LAYERS


def test_the_edits_of_a_decode_are_built_once():
    hooks = adapters.install(tiny_model("llama"))
    stacker, plan = Stacker(), tiny_plan(hooks, ("1r@all", random_vector(1)))
    first = stacker.edits([plan], np.full((1, 1), PROMPT))
    again = stacker.edits([plan], np.full((1, 1), PROMPT))
    assert all(first[place] is again[place] for place in first)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_add_is_one_primitive(dtype):
    h, shift = mx.ones((1, 1, HIDDEN), dtype), mx.ones((1, 1, HIDDEN))
    mx.eval(h, shift)
    assert primitives(ops.add(h, shift)) == 1
    assert primitives(partial(ops.add, shift=shift)(h)) == 1
