"""What every endpoint needs: the engine, the model, and the way from a request to a job."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from jinja2 import TemplateError

from mlxsteer import prompting
from mlxsteer.errors import MlxsteerError, UsageError
from mlxsteer.generation import Sampling
from mlxsteer.plan import Plan
from mlxsteer.probe import Probe
from mlxsteer.prompting import Messages, Thinking, Tools
from mlxsteer.server.engine import Engine
from mlxsteer.server.errors import ApiError, refused
from mlxsteer.server.extractions import Extractions
from mlxsteer.server.jobs import Generation, Job
from mlxsteer.server.schemas import SampledBody, SteeredBody
from mlxsteer.server.settings import Settings
from mlxsteer.server.vectors import Vectors

if TYPE_CHECKING:
    from mlxsteer.model import Model

T = TypeVar("T")
MAX_RECENT = 256  # answers that are listed


@dataclass(frozen=True)
class Steering:
    """The steering of one request: the plan, and what is read at each token."""

    plan: Plan
    probes: tuple[Probe, ...]

    def headers(self, generations: Sequence[Generation]) -> dict[str, str]:
        """What a response says of how it was made."""
        headers = {
            "X-Mlxsteer-Generation": ",".join(generation.id for generation in generations),
            "X-Mlxsteer-Steer": _header(str(self.plan)) or "off",
        }
        if self.plan.warnings:
            headers["X-Mlxsteer-Warnings"] = _header(" | ".join(self.plan.warnings))
        return headers


class Serving:
    """One model being served. Rendering has a thread of its own: tokenizers are not shared."""

    def __init__(self, engine: Engine, model: Model, settings: Settings) -> None:
        self.engine = engine
        self.model = model
        self.settings = settings
        self.vectors = Vectors(model)
        self.extractions = Extractions(engine, model)
        self._sites_known = False
        self._ids: deque[str] = deque(maxlen=MAX_RECENT)
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="mlxsteer-render")

    def close(self) -> None:
        """Let go of the threads."""
        self._renderer.shutdown(cancel_futures=True)

    def recent(self) -> list[Generation]:
        """The answers that the engine still knows, the oldest first."""
        found = map(self.engine.generation, self._ids)
        return [generation for generation in found if generation is not None]

    def prepare(self) -> list[str]:
        """Find the model's sites and check the default steering; returns its warnings.

        Runs the model, so it belongs on the engine's thread, or before that thread starts.
        UsageError when the default steering cannot be done.
        """
        self.model.hooks.sites_of(0)
        self._sites_known = True
        try:
            return list(self.vectors.plan(self.settings.steer).warnings)
        except ApiError as error:
            raise UsageError(error.message) from None

    async def apart(self, work: Callable[[], T]) -> T:
        """`work` on the rendering thread, so that the event loop stays free."""
        return await asyncio.get_running_loop().run_in_executor(self._renderer, work)

    # --- steering ----------------------------------------------------------------------------

    def served(self, name: str) -> str | None:
        """The steering that a model name carries behind `+`; 404 for another model."""
        own = {self.model.label, self.model.key}
        if name in own:
            return None
        base, plus, steer = name.partition("+")
        for label in own:  # a label may hold a plus itself
            if name.startswith(f"{label}+"):
                base, plus, steer = label, "+", name[len(label) + 1 :]
        if base in own and plus:
            return steer
        raise ApiError(
            404,
            f"This server runs {self.model.label!r}, not {name[:80]!r}. Set model to"
            f" {self.model.label!r}, or to '{self.model.label}+terse:3' for steering.",
            code="model_not_found",
            param="model",
        )

    async def steering(self, body: SteeredBody) -> Steering:
        """What the body (or its model's name, or the server's default) asks for."""
        suffix = self.served(body.model) if isinstance(body, SampledBody) else None
        if suffix is not None and body.steer is not None:
            raise ApiError(
                400,
                "Steering is given twice: in `model` and in `steer`. Keep one.",
                code="invalid_steering",
                param="steer",
            )
        texts = (body.steer, suffix, self.settings.steer)
        text = next(text for text in texts if text is not None)
        return await self.steering_of(text, body.meter)

    async def steering_of(self, text: str, meters: Sequence[str] = ()) -> Steering:
        """The plan of a steering text and the probes of `meters`."""
        if text.strip().lower() == "off":
            text = ""
        if text.strip() and not self._sites_known:
            await self.between(self.prepare)
        if await self.apart(lambda: self.vectors.lack_norms(text, meters)):
            await self.between(lambda: self.model.residual_norm)
        return await self.apart(
            lambda: Steering(self.vectors.plan(text), self.vectors.probes(meters))
        )

    async def between(self, work: Callable[[], Any]) -> Any:
        """`work` on the engine's thread, between two steps."""
        return await asyncio.wrap_future(self.engine.run_between(work))

    # --- prompts -------------------------------------------------------------------------------

    async def render(
        self, messages: Messages, *, thinking: Thinking = False, tools: Tools | None = None
    ) -> tuple[int, ...]:
        """Token ids of a chat. Errors of the model's template become the client's to mend."""
        if not prompting.can_think(self.model, thinking):
            raise refused("reasoning", f"{self.model.label} cannot think so. Leave it out.")

        def work() -> tuple[int, ...]:
            checked = prompting.messages_of(messages)
            found = prompting.render(self.model, checked, thinking=thinking, tools=tools)
            return tuple(found)

        try:
            return await self.apart(work)
        except TemplateError as error:
            raise ApiError(
                400,
                f"The chat template of {self.model.label} refuses these messages: {error}",
                code="invalid_messages",
                param="messages",
            ) from None

    async def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of plain text."""
        encode = self.model.tokenizer.encode
        return await self.apart(lambda: list(encode(text, add_special_tokens=special)))

    # --- jobs ------------------------------------------------------------------------------------

    def sampling(self, body: SampledBody, max_tokens: int | None, index: int = 0) -> Sampling:
        """How the answer's tokens are chosen; `index` tells apart the answers to one request."""
        settings = self.settings
        seed = getattr(body, "seed", None)
        temperature = body.temperature
        return Sampling(
            max_tokens=settings.max_tokens if max_tokens is None else max_tokens,
            temp=settings.temperature if temperature is None else temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            min_p=getattr(body, "min_p", None) or 0.0,
            repetition_penalty=getattr(body, "repetition_penalty", None),
            seed=None if seed is None else (seed + index) % 2**63,
        )

    def submit(self, jobs: Sequence[Job]) -> list[Generation]:
        """Put all jobs of one request in line, or none."""
        generations: list[Generation] = []
        try:
            for job in jobs:
                generations.append(self.engine.submit(job))
        except MlxsteerError:
            for generation in generations:
                generation.cancel()
            raise
        self._ids.extend(generation.id for generation in generations)
        return generations


def serving_of(request: Request) -> Serving:
    """The Serving of the app that a request came to."""
    serving: Serving = request.app.state.serving
    return serving


def _header(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode().replace("\n", " ")[:2000]
