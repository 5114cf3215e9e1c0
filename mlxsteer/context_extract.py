"""A vector from a document: the states with it in the prompt, less those without it.

As `extract`, from which the fitting comes; the poles are a question behind the document, and
the question alone.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlxsteer.contextset import ContextSet
from mlxsteer.errors import ContextLengthError, UsageError
from mlxsteer.extract import (
    ANSWER_TOKENS,
    Options,
    fit_vector,
    layers_for,
    options_of,
    store_for,
    written_answers,
)
from mlxsteer.reading import Passage, Readings, read
from mlxsteer.vector import SteeringVector

if TYPE_CHECKING:
    from mlxsteer.model import Model

KIND = "context"  # what `about` of such a vector says

Prompts = list[list[int]]


def extract_context(
    model: Model,
    context: ContextSet,
    *,
    show_progress: bool = True,
    resume: bool = True,
    **options: Any,
) -> dict[str, SteeringVector]:
    """{position: vector} of `context`; `options` are the fields of `extract.Options`.

    position: `last_prompt` (default), `answer_mean` (over the answers given with the document,
    read after both prompts), or `both`. Interrupted, the same call goes on where it stopped.
    Raises ContextLengthError, UsageError, VectorError (a document that changes nothing).
    """
    chosen = _checked(options_of(options), context)
    layers = layers_for(model.n_layers, None, chosen)
    asked = _asked(context, chosen)
    prompts = prompt_pairs(model, context, asked)
    position = str(chosen.position)
    kept = store_for(model, "context answers", ANSWER_TOKENS, prompts) if resume else None
    answers: Prompts = [[] for _ in asked]
    if position != "last_prompt":
        given = [full for full, _ in prompts]
        label = f"Answering {context.name}"
        answers = written_answers(model, label, given, kept, show_progress)
    passages = [
        _passage(prompt, answer, position)
        for pair, answer in zip(prompts, answers, strict=True)
        for prompt in pair
    ]
    spans = [(passage.tokens, sorted(passage.spans.items())) for passage in passages]
    store = store_for(model, chosen.site, layers, spans) if resume else None
    label = f"Reading {context.name}"
    readings = read(
        model, passages, layers, chosen.site, label=label, store=store, show_progress=show_progress
    )
    if kept is not None:
        shutil.rmtree(kept, ignore_errors=True)
    found = {}
    for span, means in readings.means.items():
        about = _about(context, chosen, span, readings, prompts)
        found[span] = fit_vector(model, means, layers, chosen, about)
    return found


def prompt_pairs(
    model: Model, context: ContextSet, indices: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """(prompt with the document, prompt without it) of each question.

    Raises ContextLengthError, with the counts, where the document does not fit.
    """
    try:
        return [
            (model.render(list(context.asking(i))), model.render(list(context.bare(i))))
            for i in indices
        ]
    except ContextLengthError as error:
        tokens = len(model.tokenizer.encode(context.document))
        raise ContextLengthError(
            f"{context.name} has {tokens:,} tokens; {model.label} takes {model.context_length:,},"
            " question and answer included. Give a part of it, or choose a model with a longer"
            " context."
        ) from error


def context_tokens(prompts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> int:
    """How many tokens the document takes in each request."""
    return round(sum(len(full) - len(bare) for full, bare in prompts) / len(prompts))


def _checked(options: Options, context: ContextSet) -> Options:
    if options.op == "project":
        raise UsageError("A projection removes; a document is to be added. Use --op add or clamp.")
    if options.position == "text_mean":
        raise UsageError("A document is read at last_prompt, answer_mean or both, not text_mean.")
    position = options.position or "last_prompt"
    return replace(options, position=position, name=options.name or context.name)


def _asked(context: ContextSet, options: Options) -> list[int]:
    """The questions to learn from: all that are not held out, or `pairs` of them."""
    known = list(context.training)
    count = min(options.pairs, len(known))
    return sorted(random.Random(options.seed).sample(known, count))


def _passage(prompt: Sequence[int], answer: Sequence[int], position: str) -> Passage:
    spans = {}
    if position != "answer_mean":
        spans["last_prompt"] = (len(prompt) - 1, len(prompt))
    if position != "last_prompt":
        spans["answer_mean"] = (len(prompt), len(prompt) + len(answer))
    return Passage((*prompt, *answer), spans)


def _about(
    context: ContextSet,
    options: Options,
    position: str,
    readings: Readings,
    prompts: Sequence[tuple[list[int], list[int]]],
) -> dict[str, Any]:
    return {
        "kind": KIND,
        "description": f"As if the document {context.name} stood in the prompt.",
        "positive_label": "with the document",
        "negative_label": "without it",
        "thinking": False,
        "method": options.method,
        "orthogonalised": options.orthogonalise,
        "extract_position": position,
        "n_pairs": len(prompts),
        "context_tokens": context_tokens(prompts),
        "document_sha256": context.document_sha256,
        "n_questions": len(context.questions),
        "questions_sha256": context.questions_sha256,
        "held_out": list(context.held_out),
        "seed": options.seed,
        "tokens_run": readings.tokens_run,
        "tokens_given": readings.tokens_given,
    }
