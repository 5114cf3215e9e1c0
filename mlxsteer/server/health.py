"""GET /health: whether the server takes requests."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from mlxsteer.server.serving import serving_of

router = APIRouter(tags=["status"])


@router.get("/health", responses={503: {"description": "Shutting down."}})
async def health(request: Request) -> JSONResponse:
    """`ok`, or 503 and `closing` while the server shuts down."""
    serving = serving_of(request)
    if request.app.state.closing:
        return JSONResponse({"status": "closing"}, 503)
    return JSONResponse({"status": "ok", "model": serving.model.label})
