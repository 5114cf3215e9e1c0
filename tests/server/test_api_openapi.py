"""The server against its own OpenAPI document: whatever fits it, or does not, is answered well."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from mlxsteer.model import Model
from mlxsteer.server.app import create_app
from mlxsteer.server.engine import Engine
from tests.server.api import ScriptedEngine, running


@pytest.mark.slow
def test_every_operation_keeps_to_the_document(chatty: Model) -> None:
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as openapi_checks

    checks = [
        not_a_server_error,
        openapi_checks.status_code_conformance,
        openapi_checks.content_type_conformance,
        openapi_checks.response_schema_conformance,
        openapi_checks.negative_data_rejection,
    ]
    with running(ScriptedEngine(chatty, ["w1 ", "w2"]), chatty) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) >= 20
        for operation in operations:
            for mode in GenerationMode:

                @settings(
                    max_examples=6, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck),
                )  # fmt: skip
                @given(case=operation.as_strategy(generation_mode=mode))
                def keeps_to_it(case: schemathesis.Case) -> None:
                    case.validate_response(case.call(), checks=checks)

                with suppress(Unsatisfiable):  # nothing in it that could be wrong
                    keeps_to_it()


def test_the_document_lists_every_endpoint_and_no_foreign_error(chatty: Model) -> None:
    document = create_app(Engine(chatty), chatty).openapi()
    paths = document["paths"]
    generating = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
    assert generating <= set(paths)
    for operations in paths.values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert operation["description"]
    for name in ("ChatBody", "CompletionBody", "ResponseBody", "MessagesBody"):
        assert {"steer", "meter"} <= set(document["components"]["schemas"][name]["properties"])
