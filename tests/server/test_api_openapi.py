"""The server against its own OpenAPI document: whatever fits it, or does not, is answered well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS

from mlxsteer.model import Model
from mlxsteer.server.app import create_app
from mlxsteer.server.engine import Engine
from mlxsteer.server.settings import Settings
from tests.server.api import ScriptedEngine, running


@pytest.fixture(scope="module")
def scripted(chatty: Model) -> Iterator[str]:
    with running(ScriptedEngine(chatty, ["w1 ", "w2"]), chatty) as address:
        yield address


@pytest.fixture
def document(scripted: str) -> Any:
    return schemathesis.openapi.from_url(f"{scripted}/openapi.json")


schema = schemathesis.pytest.from_fixture("document")
WANTED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
_suppressed = [
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
    HealthCheck.function_scoped_fixture,
    HealthCheck.data_too_large,
]


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=30, deadline=None, suppress_health_check=_suppressed, database=None)
def test_every_operation_keeps_to_the_document(case: schemathesis.Case) -> None:
    response = case.call()
    case.validate_response(response, checks=CHECKS.get_by_names(list(WANTED)))


def test_the_document_lists_every_endpoint_and_no_other_errors(chatty: Model) -> None:
    paths = create_app(Engine(chatty), chatty, Settings()).openapi()["paths"]
    generating = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
    assert generating <= set(paths)
    for operations in paths.values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert operation["summary"]
    body = create_app(Engine(chatty), chatty, Settings()).openapi()["components"]["schemas"]
    for name in ("ChatBody", "CompletionBody", "ResponseBody", "MessagesBody"):
        assert {"steer", "meter"} <= set(body[name]["properties"])
