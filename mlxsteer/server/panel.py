"""The panel of sliders: packaged files under a policy that lets nothing in from elsewhere."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

from mlxsteer.server.errors import ApiError

router = APIRouter(include_in_schema=False)

TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; object-src 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/panel/{name}")
async def file(name: str) -> Response:
    """One of its files, by name."""
    return _file(name)


def _file(name: str) -> Response:
    folder = resources.files("mlxsteer.server") / "panel"
    known = {entry.name: entry for entry in folder.iterdir()} if folder.is_dir() else {}
    kind = TYPES.get(name.rpartition(".")[2])
    if name not in known or kind is None:
        raise ApiError(404, f"The panel has no file {name[:80]!r}.", code="not_found")
    return Response(known[name].read_bytes(), media_type=kind, headers=HEADERS)
