"""What tests of conversations share: a reference that reuses nothing, and turns held against it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlxsteer.generation import Piece, Sampling
from mlxsteer.model import Model
from mlxsteer.prompting import first_phase
from mlxsteer.session import Session
from tests.chat_models import random_directions

SHORT = Sampling(max_tokens=12)


def keep_push(model: Model) -> None:
    """A vector `push` among the user's."""
    from mlxsteer import library

    library.save(random_directions(width=model.d_model, n_layers=model.n_layers), model.key)


def from_nothing(model: Model, prompt: list[int], steer: Any, count: int) -> list[int]:
    """Greedy tokens, each from a pass over the whole sequence; ends with the end token."""
    tokens: list[int] = []
    plan = model.plan(steer)
    while len(tokens) < count:
        cache = model.make_cache()
        cache[-1].rows[0].first = first_phase(model, prompt)
        logits = model.logits(prompt + tokens, plan, cache, prompt_length=len(prompt))
        tokens.append(int(mx.argmax(logits[-1]).item()))
        if tokens[-1] in model.tokenizer.eos_token_ids:
            break
    return tokens


def tokens_of(pieces: Iterator[Piece]) -> list[int]:
    """The tokens of an answer, without what only closes it."""
    return [piece.token for piece in pieces if piece.token >= 0]


def expect_turn(session: Session, text: str) -> list[int]:
    """Ask, and check the answer against the reference; returns its tokens."""
    prompt = prompt_of(session, text)
    steer = session.plan
    got = tokens_of(session.ask(text))
    assert got == from_nothing(session.model, prompt, steer, session.sampling.max_tokens)
    return got


def prompt_of(session: Session, text: str) -> list[int]:
    """What a session sends for `text`: all of the chat before it, rendered anew."""
    system = [{"role": "system", "content": session.system}] if session.system else []
    messages = [*system, *session.messages, {"role": "user", "content": text}]
    return session.model.render(messages, thinking=session.thinking)
