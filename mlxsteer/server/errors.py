"""Errors as HTTP: which status an error has, and the body that each API's clients expect.

Paths under /v1/messages get Anthropic's shape, all others OpenAI's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mlxsteer.errors import ContextLengthError, MlxsteerError
from mlxsteer.server.jobs import Busy, Closing

log = logging.getLogger("mlxsteer.server")

_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_OPENAI_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error with its status. code: a word for programs; param: the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


def refused(param: str, message: str) -> ApiError:
    """A field asks for what this server cannot do."""
    return ApiError(400, message, code="unsupported_value", param=param)


def as_api_error(error: BaseException) -> ApiError:
    """The ApiError that tells a client of `error`; details of a bug stay in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        wait = str(max(1, math.ceil(error.retry_after)))
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": wait})
    if isinstance(error, Closing):
        return ApiError(503, str(error), code="closing", headers={"Retry-After": "10"})
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, MlxsteerError):
        return ApiError(400, str(error), code="invalid_value")
    log.error("request failed", exc_info=error)
    message = "The server failed on this request; its log says why. Other requests go on."
    return ApiError(500, message, code="internal_error")


def body_of(error: ApiError, path: str) -> dict[str, Any]:
    """The JSON body of `error` for the API that `path` belongs to."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_KINDS.get(error.status, "api_error" if error.status >= 500 else None)
        return {
            "type": "error",
            "error": {"type": kind or "invalid_request_error", "message": error.message},
        }
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": _OPENAI_KINDS.get(error.status, kind),
            "param": error.param,
            "code": error.code,
        }
    }


def response_of(error: ApiError, path: str) -> JSONResponse:
    """`error` as a response."""
    return JSONResponse(body_of(error, path), error.status, headers=error.headers)


def install(app: FastAPI) -> None:
    """Make `app` answer every error in these shapes."""

    def known(request: Request, error: Exception) -> JSONResponse:
        return response_of(as_api_error(error), request.url.path)

    def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = _HTTP_MESSAGES.get(error.status_code, str(error.detail))
        code = _HTTP_CODES.get(error.status_code, "invalid_request")
        found = ApiError(error.status_code, message, code=code, headers=error.headers)
        return response_of(found, request.url.path)

    def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return response_of(_of_validation(error), request.url.path)

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(MlxsteerError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, known)


_HTTP_MESSAGES = {
    400: "The body is not JSON that can be read. Send UTF-8 JSON.",
    404: "There is no such address here. GET /openapi.json lists all.",
    405: "This address does not take that method. GET /openapi.json lists all.",
}
_HTTP_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(where) or None
    if first["type"] == "json_invalid":
        return ApiError(400, _HTTP_MESSAGES[400], code="invalid_json")
    if first["type"] == "extra_forbidden":
        message = f"Unknown field {param!r}: this server would do nothing with it. Leave it out."
        return ApiError(400, message, code="unknown_field", param=param)
    reason = str(first["msg"]).removeprefix("Value error, ")
    message = f"{param}: {reason}" if param else reason
    return ApiError(400, message, code="invalid_value", param=param)
