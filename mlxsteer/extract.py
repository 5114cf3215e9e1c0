"""A vector from a contrast set: which tokens to read, at which layers, and what direction results.

Reads through `reading`, decides through `directions`. Costs two passes over the pairs' tokens,
less the prefixes they share; reading an instruction's answers also costs writing them.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsteer import directions, prompting
from mlxsteer.contrast import ContrastSet, Pair
from mlxsteer.errors import UsageError, near_matches
from mlxsteer.files import cache_dir, write_text
from mlxsteer.generation import Sampling, generate_batch
from mlxsteer.plan import Plan
from mlxsteer.progress import progress, say
from mlxsteer.reading import Passage, Readings, read
from mlxsteer.vector import OPS, SITES, Array, SteeringVector

if TYPE_CHECKING:
    from mlxsteer.model import Model

DEFAULT_PAIRS = 100
ADD_BAND = (0.35, 0.70)  # of depth (DESIGN, part 3)
PROJECT_BAND = (0.20, 1.0)
ROUNDING = 1e-9  # 0.1 of 30 layers is 3, not 3.0000000000000004
ANSWER_TOKENS = 48
ANSWERS_AT_A_TIME = 64  # kept together, so that little is lost when interrupted
POSITIONS = ("last_prompt", "answer_mean", "text_mean", "both")


@dataclass(frozen=True)
class Options:
    """How to extract. None means: as the contrast set says, else the default.

    pairs: how many, at most what the set can deal. position: `last_prompt`, `answer_mean`, or
    `both` (for an instruction set: the answer's average is read in the same pass and kept
    beside). layers: 0-based. orthogonalise: remove the component along the negatives' mean.
    """

    pairs: int = DEFAULT_PAIRS
    method: str = "mean"
    position: str | None = None
    layers: tuple[int, ...] | None = None
    site: str = "residual"
    op: str = "add"
    orthogonalise: bool = False
    norm_preserving: bool | None = None
    seed: int = 0
    name: str | None = None

    def __post_init__(self) -> None:
        checks = (
            ("method", self.method, tuple(directions.METHODS)),
            ("site", self.site, tuple(site for site in SITES if site != "stream")),
            ("op", self.op, OPS),
            ("position", self.position or "both", POSITIONS),
        )
        for what, value, known in checks:
            if value not in known:
                raise UsageError(
                    f"Unknown {what} {value!r}.{near_matches(value, known)}"
                    f" Choose from {', '.join(known)}."
                )
        if self.pairs < 1:
            raise UsageError(f"{self.pairs} pairs are too few: at least 1, better 8 or more.")


def extract(
    model: Model,
    contrast: ContrastSet,
    *,
    show_progress: bool = True,
    resume: bool = True,
    **options: Any,
) -> SteeringVector:
    """The vector of `contrast` on `model`; `options` are the fields of `Options`.

    Interrupted, the same call goes on where it stopped (`resume`). Raises UsageError,
    ContrastError, VectorError (poles that do not differ), ModelError (site).
    """
    chosen = options_of(options)
    if chosen.position == "both":
        raise UsageError("One vector has one position; `extract_positions` gives both.")
    found = extract_positions(
        model, contrast, show_progress=show_progress, resume=resume, **asdict(chosen)
    )
    return next(iter(found.values()))


def extract_positions(
    model: Model,
    contrast: ContrastSet,
    *,
    show_progress: bool = True,
    resume: bool = True,
    **options: Any,
) -> dict[str, SteeringVector]:
    """{position: vector}, all positions asked for read in one pass."""
    chosen = options_of(options)
    layers = layers_for(model.n_layers, contrast, chosen)
    pairs = contrast.pairs(min(chosen.pairs, contrast.max_pairs), chosen.seed)
    if chosen.pairs > len(pairs) and chosen.pairs != DEFAULT_PAIRS:
        say(f"{contrast.name} holds {len(pairs)} pairs; using all.", enabled=show_progress)
    position = chosen.position or contrast.extract.position
    asked = store_for(model, "answers", ANSWER_TOKENS, pairs) if resume else None
    passages = _passages(model, contrast, pairs, position, asked, show_progress)
    spans = [(passage.tokens, sorted(passage.spans.items())) for passage in passages]
    store = store_for(model, chosen.site, layers, spans) if resume else None
    readings = read(
        model,
        passages,
        layers,
        chosen.site,
        label=f"Reading {contrast.name}",
        store=store,
        show_progress=show_progress,
    )
    if asked is not None:
        shutil.rmtree(asked, ignore_errors=True)
    return {
        span: _vector(model, contrast, chosen, layers, span, readings, len(pairs))
        for span in readings.means
    }


def layers_for(n_layers: int, contrast: ContrastSet | None, options: Options) -> tuple[int, ...]:
    """The layers to act on: those asked for, else the set's band of depth, else the default."""
    if options.layers is not None:
        for layer in options.layers:
            if not 0 <= layer < n_layers:
                raise UsageError(
                    f"Layer {layer} is out of range: this model has layers 0 to {n_layers - 1}."
                )
        if not options.layers:
            raise UsageError("No layers were given. Type e.g. --layers 10-20.")
        return tuple(sorted({int(layer) for layer in options.layers}))
    low, high = ADD_BAND if options.op == "add" else PROJECT_BAND
    if options.op == "add" and contrast and contrast.extract.band is not None:
        low, high = contrast.extract.band
    first = min(math.ceil(low * n_layers - ROUNDING), n_layers - 1)
    end = min(math.floor(high * n_layers + ROUNDING) + 1, n_layers)
    return tuple(range(first, max(first + 1, end)))


def options_of(options: Mapping[str, Any]) -> Options:
    """`options` checked; UsageError names one that does not exist."""
    known = Options.__dataclass_fields__
    for name in options:
        if name not in known:
            raise UsageError(
                f"Unknown option {name!r}.{near_matches(name, known)} Options: {', '.join(known)}."
            )
    return Options(**options)


# --- what to read ---------------------------------------------------------------------------


def _passages(
    model: Model,
    contrast: ContrastSet,
    pairs: Sequence[Pair],
    position: str,
    store: Path | None,
    show: bool,
) -> list[Passage]:
    """Positive then negative passage of every pair, in turn; `store` keeps answers written."""
    poles = [pole for pair in pairs for pole in (pair.positive, pair.negative)]
    if contrast.combine == "texts":
        _require_position(contrast, position, "text_mean")
        return [_text_passage(model, str(text)) for text in poles]
    if contrast.combine == "answers":
        _require_position(contrast, position, "answer_mean")
        return [_answered(model, list(messages)) for messages in poles]  # type: ignore[arg-type]
    if position == "text_mean":
        raise UsageError(f"{contrast.name} holds instructions, no texts: read last_prompt.")
    prompts = [model.render(list(messages)) for messages in poles]  # type: ignore[arg-type]
    if position == "last_prompt":
        return [_spanned(prompt, {"last_prompt": _last(prompt)}) for prompt in prompts]
    answers = written_answers(model, f"Answering {contrast.name}", prompts, store, show)
    both = position == "both"
    return [_prompt_and_answer(*part, both) for part in zip(prompts, answers, strict=True)]


def _require_position(contrast: ContrastSet, position: str, possible: str) -> None:
    if position != possible:
        raise UsageError(
            f"{contrast.name} holds {contrast.combine}; it is read at {possible}, not {position}."
        )


def _spanned(tokens: Sequence[int], spans: Mapping[str, tuple[int, int]]) -> Passage:
    return Passage(tuple(tokens), spans)


def _last(prompt: Sequence[int]) -> tuple[int, int]:
    return (len(prompt) - 1, len(prompt))


def _prompt_and_answer(prompt: Sequence[int], answer: Sequence[int], both: bool) -> Passage:
    spans = {"last_prompt": _last(prompt)} if both else {}
    spans["answer_mean"] = (len(prompt), len(prompt) + len(answer))
    return _spanned([*prompt, *answer], spans)


def _text_passage(model: Model, text: str) -> Passage:
    """A plain text, read from its second token on: the first position is a sink."""
    tokens = list(model.tokenizer.encode(text))
    prompting.within_context(model, tokens)
    return _spanned(tokens, {"text_mean": (min(1, len(tokens) - 1), len(tokens))})


def _answered(model: Model, messages: list[dict[str, Any]]) -> Passage:
    """A question with a given answer, read over the answer."""
    prompt = model.render(messages[:-1])
    answer = list(model.tokenizer.encode(messages[-1]["content"], add_special_tokens=False))
    tokens = prompting.within_context(model, [*prompt, *answer])
    return _spanned(tokens, {"answer_mean": (len(prompt), len(tokens))})


def written_answers(
    model: Model, label: str, prompts: Sequence[Sequence[int]], store: Path | None, show: bool
) -> list[list[int]]:
    """What the model answers to each prompt, greedily; at least one token each."""
    sampling = Sampling(max_tokens=ANSWER_TOKENS)
    end = sorted(model.tokenizer.eos_token_ids)[0]
    answers: list[list[int]] = []
    with progress(label, len(prompts), enabled=show) as advance:
        for start in range(0, len(prompts), ANSWERS_AT_A_TIME):
            part = prompts[start : start + ANSWERS_AT_A_TIME]
            path = store / f"{start:05d}.json" if store else None
            written = _kept_answers(path, len(part))
            if written is None:
                plans = [Plan([])] * len(part)
                found = generate_batch(model, part, plans, sampling)
                written = [answer.tokens or [end] for answer in found]
                if path is not None:
                    write_text(path, json.dumps(written))
            answers += written
            advance(len(part))
    return answers


def _kept_answers(path: Path | None, count: int) -> list[list[int]] | None:
    """The answers that an interrupted call left at `path`; None when they are not whole."""
    try:
        kept = json.loads(path.read_text()) if path is not None else None
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, list) and len(kept) == count else None


def store_for(model: Model, *what: Any) -> Path:
    """Where the finished part of exactly this work lies until the whole is done."""
    facts = (model.stamp["weights_fingerprint"], model.dtype, model.config, what)
    return cache_dir() / "extract" / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


# --- what results ---------------------------------------------------------------------------


def _vector(
    model: Model,
    contrast: ContrastSet,
    options: Options,
    layers: Sequence[int],
    position: str,
    readings: Readings,
    n_pairs: int,
) -> SteeringVector:
    options = replace(
        options,
        name=options.name or contrast.name,
        norm_preserving=_norm_preserving(contrast, options),
    )
    about = _about(contrast, options, position, readings, n_pairs)
    acts_on = contrast.extract.acts_on
    return fit_vector(model, readings.means[position], layers, options, about, acts_on)


def fit_vector(
    model: Model,
    means: Array,
    layers: Sequence[int],
    options: Options,
    about: Mapping[str, Any],
    acts_on: str = "answer",
) -> SteeringVector:
    """The vector of `means` [2N, layers, D]: positive and negative of every pair, in turn.

    `options` names it; `about` gets the layers' reports. Raises VectorError when the poles do
    not differ.
    """
    norm, name = model.residual_norm, str(options.name)
    arrays, reports, control = {}, [], {}
    for index, layer in enumerate(layers):
        positive, negative = means[0::2, index], means[1::2, index]
        how = (options.method, options.orthogonalise)
        arrays[layer] = directions.fit(positive, negative, *how)
        directions.require_nonzero(arrays[layer], negative, name, layer)
        if options.orthogonalise:
            control[layer] = negative.mean(axis=0)
        report = directions.report(layer, positive, negative, float(norm[layer]), *how)
        reports.append(asdict(report) | _poles(positive, negative, arrays[layer]))
    share = np.zeros(model.n_layers, np.float32)
    share[list(layers)] = 1.0 / len(layers)
    return SteeringVector.from_arrays(
        arrays,
        op=options.op,
        site=options.site,
        name=name,
        n_layers=model.n_layers,
        residual_norm=norm,
        layer_share=share,
        control_mean=control,
        norm_preserving=bool(options.norm_preserving),
        positions=acts_on,
        model={key: value for key, value in model.stamp.items() if key not in _SHAPE},
        about={**about, "layer_reports": reports},
    )


_SHAPE = ("d_model", "n_layers")


def _poles(positive: Array, negative: Array, direction: Array) -> dict[str, float]:
    """Where the poles [N, D] lie along `direction` [D] on average: the scale of its readings."""
    unit = direction / np.linalg.norm(direction)
    return {
        "positive_reading": float((positive @ unit).mean()),
        "negative_reading": float((negative @ unit).mean()),
    }


def _norm_preserving(contrast: ContrastSet, options: Options) -> bool:
    if options.norm_preserving is not None:
        return options.norm_preserving
    return contrast.extract.norm_preserving and options.op == "add"


def _about(
    contrast: ContrastSet,
    options: Options,
    position: str,
    readings: Readings,
    n_pairs: int,
) -> dict[str, Any]:
    return {
        "description": contrast.description,
        "positive_label": contrast.positive_label,
        "negative_label": contrast.negative_label,
        "thinking": False,
        "method": options.method,
        "orthogonalised": options.orthogonalise,
        "extract_position": position,
        "n_pairs": n_pairs,
        "contrast_set": contrast.name,
        "dataset_sha256": contrast.digest(),
        "seed": options.seed,
        "license": contrast.license or None,
        "tokens_run": readings.tokens_run,
        "tokens_given": readings.tokens_given,
    }
