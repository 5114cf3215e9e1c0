"""GET /v1/models: the one model that is served."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from mlxsteer import prompting
from mlxsteer.server.errors import ApiError
from mlxsteer.server.serving import Serving, serving_of

router = APIRouter(tags=["models"])
_STARTED = int(time.time())


def _facts(serving: Serving) -> dict[str, Any]:
    model = serving.model
    return {
        "id": model.label,
        "object": "model",
        "created": _STARTED,
        "owned_by": "mlxsteer",
        "type": "model",
        "display_name": model.label,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_STARTED)),
        "context_length": model.context_length,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "can_think": prompting.can_think(model),
        "can_call_tools": prompting.can_call_tools(model),
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The served model, in a shape that OpenAI's and Anthropic's clients both read."""
    facts = _facts(serving_of(request))
    page = {"has_more": False, "first_id": facts["id"], "last_id": facts["id"]}
    return {"object": "list", "data": [facts], **page}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """The served model, when `name` is its name."""
    serving = serving_of(request)
    if name not in (serving.model.label, serving.model.key):
        message = f"This server runs {serving.model.label!r}, not {name[:80]!r}."
        raise ApiError(404, message, code="model_not_found", param="model")
    return _facts(serving)
