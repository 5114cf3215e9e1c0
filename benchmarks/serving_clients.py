"""What clients of all manners do to a running server, and the statuses that each may get back.

Well-behaved ones ask in every API's form, steered or not, whole or streamed; others leave, read
slowly, move sliders, or send what is wrong. Knows nothing of the server but its address.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
SLIDERS = "/v1/steering/generations"
BUSY = 429
LEFT = 0  # the client went before a status, or in the middle of its answer


@dataclass(frozen=True)
class Asked:
    """A greedy question whose answer is known. answer: its thoughts, then what it says."""

    question: str
    steer: str
    answer: str


@dataclass
class Client:
    """One client. model: the served name; key: what lets it in; tokens: of an answer."""

    web: httpx.AsyncClient
    model: str
    key: str
    rng: random.Random
    known: list[Asked]
    words: list[str]
    tokens: int
    equal: int = 0
    different: int = 0

    def body(self, question: str, **fields: Any) -> dict[str, Any]:
        """A chat body."""
        messages = [{"role": "user", "content": question}]
        return {"model": self.model, "messages": messages, "max_tokens": self.tokens, **fields}

    def a_question(self) -> str:
        """One that the server has probably not seen."""
        return " ".join(self.rng.choices(self.words, k=self.rng.randrange(3, 40)))

    def some(self) -> dict[str, Any]:
        """A chat body with a question, sampling and a strength of its own."""
        vector = self.rng.choice([asked.steer for asked in self.known if asked.steer])
        steer = f"{vector.partition(':')[0]}:{self.rng.uniform(-3, 3):.2f}"
        seed = self.rng.randrange(1000)
        return self.body(self.a_question(), steer=steer, temperature=0.9, seed=seed)

    def note(self, asked: Asked, parts: Sequence[dict[str, Any]]) -> None:
        """Count whether a message, or the deltas of one, is the known answer."""
        names = ("reasoning_content", "content")
        same = asked.answer == "".join(part.get(name) or "" for name in names for part in parts)
        self.equal += same
        self.different += not same

    async def send(self, body: Any, path: str = CHAT, **options: Any) -> int:
        """The status of a request that is read to its end."""
        return (await self.web.post(path, json=body, **options)).status_code


# --- those that behave -----------------------------------------------------------------------


async def known_answer(client: Client) -> int:
    asked = client.rng.choice(client.known)
    reply = await client.web.post(CHAT, json=client.body(asked.question, steer=asked.steer))
    if reply.status_code == 200:
        client.note(asked, [reply.json()["choices"][0]["message"]])
    return reply.status_code


async def known_stream(client: Client, pause: float = 0.0) -> int:
    asked = client.rng.choice(client.known)
    body = client.body(asked.question, steer=asked.steer, stream=True)
    deltas = []
    async with client.web.stream("POST", CHAT, json=body) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {") and reply.status_code == 200:
                deltas.append(json.loads(line[6:])["choices"][0]["delta"])
                await asyncio.sleep(pause)
    if reply.status_code == 200:
        client.note(asked, deltas)
    return reply.status_code


async def slow_reader(client: Client) -> int:
    return await known_stream(client, pause=0.3)


async def sampled(client: Client) -> int:
    return await client.send(client.some())


async def other_form(client: Client) -> int:
    """Completions, Responses and Messages, streamed or not."""
    stream = client.rng.random() < 0.5
    question, limit = client.a_question(), client.tokens
    path, fields = client.rng.choice(
        [
            ("/v1/completions", {"prompt": question, "max_tokens": limit}),
            ("/v1/responses", {"input": question, "max_output_tokens": limit}),
            ("/v1/messages", client.body(question)),
        ]
    )
    return await client.send({"model": client.model, "stream": stream, **fields}, path)


async def looks_around(client: Client) -> int:
    paths = ["/health", "/metrics", "/v1/models", SLIDERS, "/v1/steering/vectors", "/", "/nowhere"]
    path = client.rng.choice(paths)
    status = (await client.web.get(path)).status_code
    return 200 if (path, status) == ("/nowhere", 404) else status


# --- those that change their mind ------------------------------------------------------------


async def leaves(client: Client) -> int:
    """Closes its connection after some chunks."""
    async with client.web.stream("POST", CHAT, json={**client.some(), "stream": True}) as reply:
        wanted = client.rng.randrange(5)
        async for _ in reply.aiter_lines():
            wanted -= 1
            if wanted < 0:
                return LEFT if reply.status_code == 200 else reply.status_code
    return reply.status_code


async def leaves_unanswered(client: Client) -> int:
    """Gives up on a whole answer before it comes."""
    try:
        return await client.send(client.some(), timeout=client.rng.uniform(0.01, 0.5))
    except httpx.TimeoutException:
        return LEFT


async def _twice(call: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    """The status of a request that may be sent again: a kept connection can be one that the
    server is just closing as idle.
    """
    try:
        reply = await call(*arguments, **options)
    except (httpx.ReadError, httpx.RemoteProtocolError):
        reply = await call(*arguments, **options)
    return int(reply.status_code)


async def moves_a_slider(client: Client) -> int:
    """PATCHes the steering of its own answer at every few chunks, then perhaps stops it."""
    body = {**client.some(), "stream": True}
    statuses = set()
    async with client.web.stream("POST", CHAT, json=body) as reply:
        if reply.status_code != 200:
            return reply.status_code
        address = f"{SLIDERS}/{reply.headers['x-mlxsteer-generation']}"
        async for line in reply.aiter_lines():
            if line and client.rng.random() < 0.3:
                steer = {"steer": client.rng.choice([asked.steer for asked in client.known])}
                statuses.add(await _twice(client.web.patch, address, json=steer))
            elif client.rng.random() < 0.02:
                statuses.add(await _twice(client.web.delete, address))
    return next(iter(statuses - {200, 409}), 200)  # 409: it was complete by then


# --- those that are wrong --------------------------------------------------------------------


async def malformed(client: Client) -> int:
    bodies = [b"", b"[]", b'{"model": "tiny", ', b"[" * 2000, b"\x00\x01", b'"text"']
    bodies.append(b'{"model": "x", "messages": [{"role": "user", "content": "\xff\xfe"}]}')
    json_type = {"Content-Type": "application/json"}
    content = client.rng.choice(bodies)
    return (await client.web.post(CHAT, content=content, headers=json_type)).status_code


async def oversized(client: Client) -> int:
    """9 MiB, announced or in chunks; a connection that the server cuts counts as told."""

    async def chunks() -> Any:
        for _ in range(9):
            yield b" " * 2**20

    content = chunks() if client.rng.random() < 0.5 else b" " * (9 << 20)
    try:
        return (await client.web.post(CHAT, content=content)).status_code
    except httpx.TransportError:
        return 413


async def half_a_body(client: Client) -> int:
    """Announces more than it sends, and hangs up."""
    url = client.web.base_url
    _, writer = await asyncio.open_connection(url.host, url.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {client.key}\r\n"
    writer.write(f'{head}Content-Length: 500\r\n\r\n{{"model":'.encode())
    await writer.drain()
    await asyncio.sleep(client.rng.random())
    writer.close()
    return LEFT


async def no_http(client: Client) -> int:
    url = client.web.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"\x16\x03\x01 hello\r\n\r\n")
    answer = await reader.read(1000)
    writer.close()
    return int(answer.split()[1]) if answer.startswith(b"HTTP/") else LEFT


async def wrong_key(client: Client) -> int:
    return await client.send(client.some(), headers={"x-api-key": "guess"})


async def foreign_page(client: Client) -> int:
    name = client.rng.choice(["Origin", "Host"])
    value = {"Origin": "http://evil.test", "Host": "evil.test"}[name]
    return await client.send(client.some(), headers={name: value})


async def wrong_fields(client: Client) -> int:
    wrong: dict[str, Any] = client.rng.choice(
        [
            {"steer": "nobody:3"},
            {"steer": "/etc/passwd:3"},
            {"steer": f"{client.known[-1].steer.partition(':')[0]}:lots"},
            {"steer": "a:1,,"},
            {"steeer": "a:1"},
            {"max_tokens": -1},
            {"temperature": "hot"},
            {"logit_bias": {"999999": 1}},
            {"messages": []},
            {"messages": [{"role": "user", "content": "word " * 20_000}]},
        ]
    )
    stream = client.rng.random() < 0.5
    return await client.send({**client.body("w1"), "stream": stream, **wrong})


@dataclass(frozen=True)
class Kind:
    """A manner. weight: how often it comes; wanted: the statuses that are right for it."""

    name: str
    act: Callable[[Client], Awaitable[int]]
    weight: int
    wanted: frozenset[int]


def _kind(act: Callable[[Client], Awaitable[int]], weight: int, *wanted: int) -> Kind:
    return Kind(act.__name__, act, weight, frozenset(wanted))


KINDS = (
    _kind(known_answer, 12, 200, BUSY),
    _kind(known_stream, 12, 200, BUSY),
    _kind(slow_reader, 4, 200, BUSY),
    _kind(sampled, 8, 200, BUSY),
    _kind(other_form, 8, 200, BUSY),
    _kind(looks_around, 4, 200),
    _kind(leaves, 6, LEFT, BUSY),
    _kind(leaves_unanswered, 5, LEFT, 200, BUSY),
    _kind(moves_a_slider, 6, 200, BUSY),
    _kind(malformed, 4, 400),
    _kind(oversized, 1, 413),
    _kind(half_a_body, 2, LEFT),
    _kind(no_http, 2, 400),
    _kind(wrong_key, 3, 401),
    _kind(foreign_page, 3, 403),
    _kind(wrong_fields, 6, 400),
)
