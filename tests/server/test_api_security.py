"""Who is let in, what is too much, and the status and shape of every refusal."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mlxsteer.errors import MlxsteerError, UsageError
from mlxsteer.model import Model
from mlxsteer.server.run import listen
from mlxsteer.server.settings import Settings
from tests.server.api import HELLO, LIMIT, WEB, ScriptedEngine, chat, post, running

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def guarded(chatty: Model) -> Iterator[str]:
    """A server with a key, small limits and one allowed origin."""
    settings = Settings(api_key="secret", body_bytes=5000, allow_origins=("http://friend.test",))
    with running(ScriptedEngine(chatty, ["w1 ", "w2"]), chatty, settings) as address:
        yield address


KEY = {"Authorization": "Bearer secret"}


def error_of(reply: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = reply.json()["error"]
    assert error["message"]
    return error


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}, {"x-api-key": "é"}],
)
def test_a_missing_or_wrong_key_is_401(guarded: str, headers: dict[str, str]) -> None:
    encoded = {name: value.encode() for name, value in headers.items()}
    reply = post(guarded, CHAT, chat("tiny"), headers=encoded)
    assert reply.status_code == 401
    assert error_of(reply)["code"] == "invalid_api_key"


@pytest.mark.parametrize("headers", [KEY, {"x-api-key": "secret"}])
def test_the_key_lets_in(guarded: str, headers: dict[str, str]) -> None:
    assert post(guarded, CHAT, chat("tiny"), headers=headers).status_code == 200


def test_every_path_but_the_page_and_health_needs_the_key(guarded: str) -> None:
    paths = WEB.get(f"{guarded}/openapi.json", headers=KEY).json()["paths"]
    for path, operations in paths.items():
        for method in operations:
            reply = WEB.request(method, guarded + path.replace("{", "").replace("}", ""))
            assert (reply.status_code == 200) if path == "/health" else reply.status_code == 401


@pytest.mark.parametrize("origin", ["http://evil.test", "null", "https://127.0.0.1.evil.test", ""])
def test_a_foreign_page_is_403(address: str, origin: str) -> None:
    reply = post(address, CHAT, chat("tiny"), headers={"Origin": origin})
    assert reply.status_code == 403
    assert error_of(reply)["code"] == "foreign_origin"
    assert "access-control-allow-origin" not in reply.headers


def test_the_servers_own_page_is_let_in(address: str) -> None:
    assert post(address, CHAT, chat("tiny"), headers={"Origin": address}).status_code == 200


@pytest.mark.parametrize("host", ["evil.test", "127.0.0.1.evil.test:80", "[", "@", "local host"])
def test_a_foreign_host_name_is_403(address: str, host: str) -> None:
    reply = post(address, CHAT, chat("tiny"), headers={"Host": host})
    assert reply.status_code == 403
    assert error_of(reply)["code"] == "foreign_host"


@pytest.mark.parametrize("host", ["localhost:1", "LOCALHOST", "127.0.0.1", "[::1]:9"])
def test_own_host_names_are_let_in(address: str, host: str) -> None:
    assert WEB.get(f"{address}/health", headers={"Host": host}).status_code == 200


def test_an_allowed_origin_gets_cors_and_others_do_not(guarded: str) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    friend = WEB.options(guarded + CHAT, headers={"Origin": "http://friend.test", **ask})
    assert friend.headers["access-control-allow-origin"] == "http://friend.test"
    evil = WEB.options(guarded + CHAT, headers={"Origin": "http://evil.test", **ask})
    assert "access-control-allow-origin" not in evil.headers
    reply = post(guarded, CHAT, chat("tiny"), headers={**KEY, "Origin": "http://friend.test"})
    assert "X-Mlxsteer-Generation" in reply.headers["access-control-expose-headers"]


def test_a_large_body_is_413_whether_announced_or_chunked(guarded: str) -> None:
    body = json.dumps(chat("tiny", user="x" * 6000)).encode()
    for content in (body, iter([body[:100], body[100:]])):
        reply = WEB.post(guarded + CHAT, content=content, headers=KEY)
        assert reply.status_code == 413
        assert error_of(reply)["code"] == "too_large"


def test_large_headers_are_431(guarded: str) -> None:
    reply = WEB.get(f"{guarded}/health", headers={"X-Much": "x" * 20_000})
    assert reply.status_code == 431


def place_of(address: str) -> tuple[str, int]:
    """Host and port."""
    place = urlsplit(address)
    return place.hostname or "", place.port or 0


def test_a_body_that_does_not_come_is_408(chatty: Model) -> None:
    with (
        running(ScriptedEngine(chatty, []), chatty, Settings(body_seconds=0.2)) as address,
        socket.create_connection(place_of(address), timeout=LIMIT) as slow,
    ):
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n"
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        reply = http.client.HTTPResponse(slow)
        reply.begin()
        assert reply.status == 408


BAD_BODIES = {
    "bad UTF-8": b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "half a surrogate": b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
    "malformed": b'{"model": "tiny", ',
    "empty": b"",
    "no object": b"[]",
    "deep": b'{"model": "tiny", "messages": ' + b"[" * 900 + b"]" * 900 + b"}",
    "too deep to parse": b"[" * 2400 + b"]" * 2400,
}


@pytest.mark.parametrize("content", BAD_BODIES.values(), ids=BAD_BODIES.keys())
@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages"])
def test_a_body_that_cannot_be_read_is_400(guarded: str, content: bytes, path: str) -> None:
    headers = {**KEY, "Content-Type": "application/json"}
    reply = WEB.post(guarded + path, content=content, headers=headers)
    assert reply.status_code == 400
    assert error_of(reply)["type"] == "invalid_request_error"
    assert (reply.json().get("type") == "error") == (path == "/v1/messages")


def test_half_a_surrogate_in_a_tool_is_400(chatty: Model, address: str) -> None:
    content = b'{"model":"tiny","prompt":[1],"max_tokens":1,"stop":["\\ud800"]}'
    headers = {"Content-Type": "application/json"}
    reply = WEB.post(f"{address}/v1/completions", content=content, headers=headers)
    assert reply.status_code == 400


BAD_FIELDS: dict[str, Any] = {
    "an unknown field": {"steeer": "x:1"},
    "NaN": {"temperature": float("nan")},
    "infinity": {"top_p": float("inf")},
    "a text for a number": {"max_tokens": "4"},
    "a negative limit": {"max_tokens": -1},
    "JSON mode": {"response_format": {"type": "json_object"}},
    "a schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    "forced tools": {"tool_choice": "required"},
    "legacy functions": {"functions": [{"name": "f"}]},
    "an image": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    },
    "an unknown role": {"messages": [{"role": "wizard", "content": "x"}]},
    "no content": {"messages": [{"role": "user"}]},
    "no message": {"messages": []},
    "a token that is none": {"logit_bias": {"99999": 1}},
    "a bias that is no token": {"logit_bias": {"w1": 1}},
    "tools for a model without": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    },
    "an effort that the model lacks": {"reasoning_effort": "max"},
    "rivals without log-probabilities": {"top_logprobs": 2},
    "an unknown vector": {"steer": "nobody:3"},
    "a path": {"steer": "/etc/passwd:3"},
    "a path in quotes": {"steer": '"../../x.safetensors":3'},
    "a Hub name": {"steer": "owner/repo:name:3"},
    "a strength that is none": {"steer": "push:lots"},
    "a strength of NaN": {"steer": "push:nan"},
    "an endless strength": {"steer": "push:1e999"},
    "a missing term": {"steer": "push:1,,"},
    "many terms": {"steer": ",".join(["push:1"] * 17)},
    "unknown positions": {"steer": "push:1@nowhere"},
    "an unknown meter": {"meter": ["nobody"]},
    "a prompt beyond the context": {"messages": [{"role": "user", "content": "w1 " * 300}]},
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.usefixtures("push")
def test_a_wrong_field_is_400_before_anything_is_streamed(
    address: str, fields: dict[str, Any], stream: bool
) -> None:
    body = json.dumps(chat("tiny", stream=stream) | fields)
    headers = {"Content-Type": "application/json"}
    reply = WEB.post(address + CHAT, content=body, headers=headers)
    assert reply.status_code == 400, reply.text
    assert error_of(reply)["code"]


def test_a_contrast_set_is_not_extracted_inside_a_request(address: str) -> None:
    reply = post(address, CHAT, chat("tiny", steer="terse:3"))
    assert reply.status_code == 400
    assert "POST /v1/steering/vectors" in error_of(reply)["message"]


def test_steering_given_twice_is_400(address: str, push: Any) -> None:
    reply = post(address, CHAT, chat("tiny+push:1", steer="push:2"))
    assert error_of(reply)["code"] == "invalid_steering"


def test_unknown_addresses_and_methods_have_the_shape_too(address: str) -> None:
    assert error_of(WEB.get(f"{address}/v2"))["code"] == "not_found"
    reply = WEB.delete(address + CHAT)
    assert (reply.status_code, error_of(reply)["code"]) == (405, "method_not_allowed")
    assert WEB.get(f"{address}/panel/..%2Fapp.py").status_code == 404
    assert WEB.get(f"{address}/v1/steering/vectors/..%2F..%2Fx").status_code == 404


def test_other_machines_need_a_key_or_an_explicit_waiver() -> None:
    with pytest.raises(UsageError, match="--insecure-no-key"):
        Settings(host="0.0.0.0")
    assert Settings(host="0.0.0.0", api_key="k").local is False
    assert Settings(host="0.0.0.0", insecure_no_key=True).api_key is None
    assert Settings(host="::1").local


def test_a_port_in_use_is_one_line() -> None:
    with (
        listen("127.0.0.1", 0) as bound,
        pytest.raises(MlxsteerError, match=r"in use.*--port"),
    ):
        listen("127.0.0.1", bound.getsockname()[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_answer(chatty: Model, stream: bool) -> None:
    engine = ScriptedEngine(chatty, ["w1"])
    engine.release.clear()
    with running(engine, chatty) as address:
        body = json.dumps({"model": "tiny", "messages": HELLO, "stream": stream})
        with socket.create_connection(place_of(address)) as client:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            _until(lambda: len(engine.generations) == 1)
            time.sleep(0.1)
            assert not engine.generations[0].cancelled
        _until(lambda: engine.generations[0].cancelled)
        engine.release.set()


def _until(holds: Any) -> None:
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
