"""What steering costs while decoding: the ratio of steered to unsteered time per token.

    python benchmarks/steering_cost.py --model demo --tokens 24 --rounds 5

Every token is decoded under each steering in turn before the next, in an order that rotates, so
that a machine that warms up or is shared slows all of them alike; a ratio compares two steps of
the same turn. One table on stdout: the median milliseconds per token, the median ratio with its
quartiles, and how many operations the graph of a step has beyond the unsteered one.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import mlxsteer  # noqa: F401  (before mlx, for its fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama

from mlxsteer.errors import MlxsteerError
from mlxsteer.fitting import ModelShape
from mlxsteer.grammar import Term
from mlxsteer.model import load
from mlxsteer.models import adapters
from mlxsteer.models.hooks import Hooks
from mlxsteer.plan import Plan, build
from mlxsteer.rows import Control, Row
from mlxsteer.steered import SteeredModel
from mlxsteer.vector import SteeringVector

PROMPT_TOKENS = 32
UNSTEERED = "unsteered"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    label, hooks, width = _model(options.model)
    steered = SteeredModel(hooks)
    plans = _plans(hooks, width)
    _round(steered, plans, 2)  # compiles and warms up
    times: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(options.rounds):
        for name, taken in _round(steered, plans, options.tokens).items():
            times[name] += taken
    primitives = {name: _primitives(steered, plan) for name, plan in plans.items()}
    print(f"{label}, {hooks.n_layers} layers, width {width}, {mx.default_device()},")
    print(f"{options.rounds} interleaved rounds of {options.tokens} tokens\n")
    print(_table(times, primitives))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What steering costs while decoding.")
    parser.add_argument("--model", default="demo", help="a model, or `tiny` (default: demo)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens per round (default: 24)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    options = parser.parse_args(arguments)
    if options.tokens < 2 or options.rounds < 1:
        parser.error("give at least 2 tokens and 1 round")
    return options


def _model(name: str) -> tuple[str, Hooks, int]:
    """(label, hooks, width); a tiny random model where the demo cannot be had."""
    if name != "tiny":
        try:
            model = load(name)
            return model.label, model.hooks, model.d_model
        except MlxsteerError as error:
            if name != "demo":
                sys.exit(str(error))
            print(f"{error}\nUsing a tiny random model instead.", file=sys.stderr)
    return "tiny random llama", adapters.install(_tiny_llama(256)), 256


def _tiny_llama(width: int) -> nn.Module:
    mx.random.seed(0)
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": 8,
        "intermediate_size": 4 * width,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": 1024,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model


def _plans(hooks: Hooks, width: int) -> dict[str, Plan]:
    """Steerings on every layer: random directions, small enough to leave the text alone."""
    shape = ModelShape("", hooks.n_layers, width, lambda: np.ones(hooks.n_layers), {})
    rng = np.random.default_rng(0)

    def vector(op: str) -> SteeringVector:
        arrays = {layer: rng.normal(size=width) for layer in range(hooks.n_layers)}
        return SteeringVector.from_arrays(arrays, op=op, n_layers=hooks.n_layers)

    def plan(count: int, op: str, unit: str) -> Plan:
        term = Term("random", 0.01, unit, "all")
        return build([(term, vector(op)) for _ in range(count)], shape)

    return {
        UNSTEERED: Plan([]),
        "1 vector, all layers": plan(1, "add", "r"),
        "5 vectors, all layers": plan(5, "add", "r"),
        "projection, all layers": plan(1, "project", ""),
    }


def _filled(steered: SteeredModel, plan: Plan) -> list[Any]:
    """The cache after a prompt of made-up tokens."""
    cache = steered.new_cache(Row(Control(plan), PROMPT_TOKENS))
    steered(mx.arange(PROMPT_TOKENS)[None], cache)
    mx.eval([entry.state for entry in cache])
    return cache


def _round(steered: SteeredModel, plans: dict[str, Plan], count: int) -> dict[str, list[float]]:
    """{name: milliseconds of each of `count` decode steps}, the plans taking turns."""
    caches = {name: _filled(steered, plan) for name, plan in plans.items()}
    taken: dict[str, list[float]] = {name: [] for name in plans}
    names = list(plans)
    for step in range(count):
        first = step % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            logits = steered(mx.array([[step]]), caches[name])
            mx.eval(logits, [entry.state for entry in caches[name]])
            taken[name].append(1000 * (time.perf_counter() - start))
    return taken


def _primitives(steered: SteeredModel, plan: Plan) -> int:
    """Operations in the graph of one decode step."""
    cache = _filled(steered, plan)
    mx.eval(steered(mx.array([[1]]), cache), [entry.state for entry in cache])
    text, token = io.StringIO(), mx.array([[1]])
    mx.export_to_dot(text, steered(token, cache))
    return text.getvalue().count("shape=rectangle")


def _table(times: dict[str, list[float]], primitives: dict[str, int]) -> str:
    base, lines = times[UNSTEERED], []
    lines.append(f"{'':<24}{'ms/token':>10}{'ratio':>8}{'quartiles':>16}{'more operations':>18}")
    for name, taken in times.items():
        ratios = [mine / theirs for mine, theirs in zip(taken, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        span = f"{low:.3f} - {high:.3f}"
        more = primitives[name] - primitives[UNSTEERED]
        lines.append(
            f"{name:<24}{statistics.median(taken):>10.2f}{middle:>8.3f}{span:>16}{more:>18}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
