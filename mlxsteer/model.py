"""The Python face: a loaded model with its tokenizer, its sites and what can be done with it.

Thin: every method hands on to the module that owns the work. Loading is `models`' business,
steering text is resolved by `library`, arrays by `plan` and `edits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxsteer import generation, library, prompting
from mlxsteer.errors import UsageError
from mlxsteer.fitting import ModelShape
from mlxsteer.generation import Sampling
from mlxsteer.grammar import Term, parse
from mlxsteer.models import adapters
from mlxsteer.models.hooks import Run
from mlxsteer.models.loading import Loaded, load_model_and_tokenizer
from mlxsteer.models.names import resolve_model
from mlxsteer.models.stamp import model_stamp
from mlxsteer.plan import ANSWER, Plan, build
from mlxsteer.prompting import Thinking
from mlxsteer.rows import Control, Row, RowCache
from mlxsteer.steered import SteeredModel
from mlxsteer.vector import SteeringVector

if TYPE_CHECKING:
    from mlxsteer.contrast import ContrastSet
    from mlxsteer.meter import Meters, Series

Steer = str | SteeringVector | Term | Plan | Mapping[str, float] | Iterable[Any] | None
Conversation = str | Sequence[Mapping[str, Any]]


def load(
    name: str | None = None,
    dtype: str | None = None,
    activation_rounding: bool | None = None,
    force: bool = False,
    *,
    allow_download: bool = True,
) -> Model:
    """Load a model: a folder, a Hub repo or an alias (`demo`, `v4-flash`).

    dtype: None = as stored on a Metal device, float32 on the CPU. activation_rounding: the
    switch of DeepSeek-V4 (None = as its config says). force: load even when memory looks short.
    Raises ModelError.
    """
    found = resolve_model(name, allow_download=allow_download)
    loaded = load_model_and_tokenizer(
        found.path, dtype=dtype, activation_rounding=activation_rounding, force=force
    )
    return Model(loaded, found.alias or found.label, found.revision, why=found.why)


class Model:
    """A loaded model and its sites.

    label: what users call it; n_layers, d_model: its shape; stamp: the facts that vectors are
    checked against; why: how the name was resolved, in a sentence.
    """

    def __init__(
        self, loaded: Loaded, label: str, revision: str | None = None, *, why: str = ""
    ) -> None:
        self.network = loaded.model
        self.tokenizer = loaded.tokenizer
        self.config = loaded.config
        self.path = loaded.path
        self.dtype = loaded.dtype
        self.label = label
        self.why = why
        self.hooks = adapters.install(loaded.model)
        self.steered = SteeredModel(self.hooks)
        self.stamp = model_stamp(loaded.path, loaded.config, loaded.tokenizer, revision, label)
        self.markers = prompting.markers(self)
        self.n_layers = self.hooks.n_layers
        self.d_model = int(self.stamp["d_model"])

    def __repr__(self) -> str:
        return f"<mlxsteer.Model {self.label}: {self.n_layers} layers, width {self.d_model}>"

    @property
    def key(self) -> str:
        """The folder name under which this model's vectors are kept."""
        return library.model_key(self.label)

    @property
    def context_length(self) -> int | None:
        """Tokens that the model was made for, or None when its config does not say."""
        config = self.config.get("text_config") or self.config
        length = config.get("max_position_embeddings")
        return int(length) if length else None

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        config = self.config.get("text_config") or self.config
        return int(config.get("vocab_size") or 100_000)

    @cached_property
    def residual_norm(self) -> np.ndarray:
        """float32 [n_layers]: median ‖residual‖ over a few chats, first position left out."""
        from mlxsteer.measure import residual_norm

        return residual_norm(self)

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            label=self.label,
            n_layers=self.n_layers,
            d_model=self.d_model,
            residual_norm=lambda: self.residual_norm,
            stamp=self.stamp,
        )

    # --- steering ----------------------------------------------------------------------------

    def plan(self, steer: Steer, *, force: bool = False) -> Plan:
        """The plan of a steering text, a vector, a term, {name: strength}, or a list of these.

        Raises UsageError (grammar), VectorError (vector), ModelError (site).
        """
        if isinstance(steer, Plan):
            return steer
        pairs = list(self._terms(steer))
        plan = build(
            pairs,
            self.shape,
            force=force,
            find=lambda name: library.find_or_extract(name, self),
        )
        self.hooks.require(plan.places)
        return plan

    def _terms(self, steer: Steer) -> Iterator[tuple[Term, SteeringVector]]:
        if steer is None:
            return
        if isinstance(steer, str):
            steer = parse(steer)
        if isinstance(steer, SteeringVector):
            yield Term(library.plain_name(steer.name)), steer
        elif isinstance(steer, Term):
            yield steer, library.find_or_extract(steer.name, self)
        elif isinstance(steer, Mapping):
            for name, amount in steer.items():
                yield from self._terms(Term(name, float(amount)))
        elif isinstance(steer, tuple) and len(steer) == 2 and isinstance(steer[0], SteeringVector):
            vector, text = steer
            name = library.plain_name(vector.name)
            term = parse(f'"{name}":{text}')[0] if isinstance(text, str) else Term(name, text)
            yield term, vector
        elif isinstance(steer, Iterable):
            for item in steer:
                yield from self._terms(item)
        else:
            raise UsageError(
                f"Cannot steer with a {type(steer).__name__}: give text like 'terse:3'."
            )

    # --- forward passes ----------------------------------------------------------------------

    def make_cache(self) -> list[Any]:
        """An empty prompt cache for `logits`."""
        return self.steered.new_cache(self.row(Plan([]), 0))

    def row(self, plan: Plan, prompt_length: int, first: int = ANSWER) -> Row:
        """A sequence of this model under `plan`."""
        return Row(Control(plan), prompt_length, first, self.markers)

    def logits(
        self,
        token_ids: Sequence[int],
        steer: Steer = None,
        cache: list[Any] | None = None,
        prompt_length: int | None = None,
    ) -> mx.array:
        """float32 [T, vocab] logits of `token_ids` [T], continuing `cache` when given.

        prompt_length: how many tokens of the whole sequence are prompt; by default all up to
        the last given one, so `@answer` steers the last position.
        """
        tokens = self._checked(token_ids)
        cache = self.make_cache() if cache is None else cache
        if not cache or not isinstance(cache[-1], RowCache):
            raise UsageError("This cache is not one of ours. Make it with model.make_cache().")
        row = cache[-1].rows[0]
        row.control.plan = self.plan(steer)
        row.prompt_length = row.seen + len(tokens) if prompt_length is None else prompt_length
        logits = self.steered(mx.array([tokens]), cache)[0].astype(mx.float32)
        mx.eval(logits, [entry.state for entry in cache])
        return logits

    def capture(
        self, token_ids: Sequence[int], sites: Sequence[str] = ("residual",), steer: Steer = None
    ) -> dict[str, mx.array]:
        """{site: float32 [n_layers, T, d_model]} of `token_ids` [T], read after any steering."""
        tokens = self._checked(token_ids)
        plan = self.plan(steer)
        places = [(layer, site) for site in sites for layer in range(self.n_layers)]
        self.hooks.require(places)
        rows = RowCache([self.row(plan, len(tokens))])
        batch = mx.array([tokens])
        weights = rows.weights(len(tokens), [plan])
        edits = self.steered.stacker.edits([plan], rows.take(batch), weights)
        run = Run(edits=edits, capture=frozenset(places))
        with self.hooks.forward(run):
            self.network(batch)
        return {
            site: mx.stack([run.captured[layer, site][0] for layer in range(self.n_layers)])
            for site in sites
        }

    def meter(
        self,
        content: str | Sequence[int],
        meters: Meters,
        steer: Steer = None,
        prompt_length: int | None = None,
    ) -> Series:
        """Readings of text or token ids, token by token, along vectors (see `meter.meter`)."""
        from mlxsteer.meter import meter

        return meter(self, content, meters, self.plan(steer), prompt_length)

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        tokens = [int(token) for token in token_ids]
        if not tokens:
            raise UsageError("There are no tokens to run. Give at least one token id.")
        return tokens

    # --- text --------------------------------------------------------------------------------

    def render(self, conversation: Conversation, *, thinking: Thinking = False) -> list[int]:
        """Token ids of a prompt: a question, or messages, through the chat template.

        thinking: False, True, or "max" (DeepSeek-V4's greatest effort).
        """
        return prompting.render(self, prompting.messages_of(conversation), thinking=thinking)

    def stream(
        self,
        conversation: Conversation,
        steer: Steer = None,
        *,
        thinking: Thinking = False,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The answer's text, piece by piece. `options` are fields of `Sampling`."""
        sampling = generation.sampling_of(sampling, options)
        tokens = self.render(conversation, thinking=thinking)
        plan = self.plan(steer)
        for piece in generation.stream(self, tokens, plan, sampling):
            if piece.text:
                yield piece.text

    def generate(self, conversation: Conversation, steer: Steer = None, **options: Any) -> str:
        """The whole answer. Takes what `stream` takes."""
        return "".join(self.stream(conversation, steer, **options))

    # --- learning ----------------------------------------------------------------------------

    def extract(self, what: str | ContrastSet, **options: Any) -> SteeringVector:
        """A vector from a contrast set or its name (see `extract.extract` for the options)."""
        from mlxsteer.contrast import ContrastSet
        from mlxsteer.extract import extract

        contrast = what if isinstance(what, ContrastSet) else ContrastSet.load(what)
        return extract(self, contrast, **options)

    def calibrate(self, vector: SteeringVector, **options: Any) -> SteeringVector:
        """The vector with its limits δ± found on this model (see `calibrate.calibrate`)."""
        from mlxsteer.calibrate import calibrate

        return calibrate(self, vector, **options)
