"""Who may call, and how much they may send: hosts, origins, the key, and sizes.

A page on another site can reach a server on this machine through the visitor's browser. Such a
request carries the page's Origin, or, after DNS rebinding, the page's own host name; both are
refused. Everything here comes before any request is parsed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from secrets import compare_digest
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxsteer.server.errors import ApiError, response_of
from mlxsteer.server.settings import Settings

OPEN_PATHS = ("/", "/health")  # and /panel/*: a page must load before it can ask for the key


class Guard:
    """ASGI middleware that refuses requests before they reach the app."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        own = socket.gethostname().lower()
        self.names = {"localhost", own, f"{own}.local", settings.host.lower()}
        self.names |= {name.lower() for name in settings.allow_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            self._check(scope)
            body = await self._body(Headers(scope=scope), receive)
        except ApiError as error:
            await response_of(error, scope["path"])(scope, receive, send)
            return
        except _Gone:
            return
        await self.app(scope, _replayed(body, receive), send)

    # --- who -------------------------------------------------------------------------------

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size + len(scope["query_string"]) + len(scope["path"]) > self.settings.header_bytes:
            raise ApiError(
                431, f"The headers are over {self.settings.header_bytes:,} bytes.", code="too_large"
            )
        host = headers.get("host", "")
        self._check_host(host)
        self._check_origin(headers.getlist("origin"), host)
        path = scope["path"]
        if path not in OPEN_PATHS and not path.startswith("/panel/"):
            self._check_key(headers)

    def _check_host(self, host: str) -> None:
        name = _hostname(host)
        if name in self.names or _is_address(name):
            return
        raise ApiError(
            403,
            f"The host {name[:80]!r} is not one of this server's. If it is a name of this machine,"
            " start the server with --allow-host NAME.",
            code="foreign_host",
        )

    def _check_origin(self, origins: list[str], host: str) -> None:
        allowed = self.settings.allow_origins
        for origin in origins:
            same = urlsplit(origin).netloc.lower() == host.lower() and "//" in origin
            if same or origin in allowed or "*" in allowed:
                continue
            raise ApiError(
                403,
                f"Pages of {origin[:80]!r} may not use this server. To let them, start it with"
                f" --allow-origin {origin[:80]}",
                code="foreign_origin",
            )

    def _check_key(self, headers: Headers) -> None:
        key = self.settings.api_key
        if key is None:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not compare_digest(given.encode("utf-8"), key.encode()):
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as `Authorization: Bearer KEY` or"
                " `x-api-key: KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    # --- how much ----------------------------------------------------------------------------

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, read before the app runs, so that no limit depends on its framing."""
        limit = self.settings.body_bytes
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise _too_large(limit)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            seconds = self.settings.body_seconds
            raise ApiError(
                408, f"The body did not arrive within {seconds:g} s.", code="timeout"
            ) from None


class _Gone(Exception):
    """The client left before its request was whole."""


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"The body is over {limit:,} bytes, the most that is taken.", code="too_large"
    )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives `body` once and then what follows it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
