"""The application: routes, what comes before them, and what the OpenAPI document says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import mlxsteer
from mlxsteer.server import (
    chat_completions,
    completions,
    errors,
    features,
    health,
    messages,
    models,
    observe,
    panel,
    responses,
    steering,
)
from mlxsteer.server.engine import Engine
from mlxsteer.server.observe import Metrics, Observer
from mlxsteer.server.security import Guard
from mlxsteer.server.serving import Serving
from mlxsteer.server.settings import Settings

if TYPE_CHECKING:
    from mlxsteer.model import Model

EXPOSED = ["X-Mlxsteer-Generation", "X-Mlxsteer-Steer", "X-Mlxsteer-Warnings", "Retry-After"]
ERROR_STATUSES = {
    400: "The request is at fault; the message says how to mend it.",
    401: "The API key is missing or wrong.",
    403: "Called by a page of another site, or by a foreign host name.",
    404: "There is no such model, vector, job or answer.",
    409: "It exists already, or is over.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to come back.",
    503: "The server is shutting down.",
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
        }
    },
}


def create_app(engine: Engine, model: Model, settings: Settings | None = None) -> FastAPI:
    """The server for `model` on a started `engine`. Closing the engine is the caller's."""
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        serving.close()

    responses_of_all: dict[int | str, dict[str, Any]] = {
        status: {"description": about, "content": {"application/json": {"schema": ERROR_SCHEMA}}}
        for status, about in ERROR_STATUSES.items()
    }
    app = FastAPI(
        title="mlxsteer",
        version=mlxsteer.__version__,
        description="A local model that is steered by vectors: OpenAI's and Anthropic's APIs with"
        f" one field more, `steer`.\n\n{steering.__doc__}",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=responses_of_all,
    )
    serving = Serving(engine, model, settings)
    app.state.serving = serving
    app.state.metrics = Metrics(engine)
    app.state.closing = False
    for module in (chat_completions, completions, responses, messages, models, steering, features):
        app.include_router(module.router)
    for module in (observe, health, panel):
        app.include_router(module.router)
    errors.install(app)
    _without_422(app)
    app.add_middleware(Guard, settings=settings)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    app.add_middleware(Observer, metrics=app.state.metrics)
    return app


def _without_422(app: FastAPI) -> None:
    """FastAPI documents its own answer to invalid bodies; ours is a 400."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
