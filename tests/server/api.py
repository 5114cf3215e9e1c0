"""A server for tests: uvicorn in a thread, on a port of its own, over a tiny or scripted model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx

from mlxsteer.model import Model
from mlxsteer.plan import ANSWER
from mlxsteer.server.app import create_app
from mlxsteer.server.engine import Engine
from mlxsteer.server.jobs import Event, Generation, Job
from mlxsteer.server.run import address_of, listen, make_server
from mlxsteer.server.settings import Settings

LIMIT = 120.0  # seconds that a test waits for what must come
# One for all: each client of its own would read the certificates anew.
WEB = httpx.Client(verify=False, timeout=LIMIT)
HELLO = [{"role": "user", "content": "w1 w2 w3"}]


class ScriptedEngine(Engine):
    """An engine that has not started: each job is answered with the given texts, one a token.

    held: answers wait until `release` is set.
    """

    def __init__(self, model: Model, texts: Sequence[str], end: Event | None = None) -> None:
        super().__init__(model)
        self.texts = texts
        self.end = end or Event("", finish_reason="stop")
        self.jobs: list[Job] = []
        self.generations: list[Generation] = []
        self.release = threading.Event()
        self.release.set()

    def submit(self, job: Job) -> Generation:
        generation = Generation(job, lambda: None)
        self.jobs.append(job)
        self.generations.append(generation)
        self._known[generation.id] = generation
        threading.Thread(target=self._write, args=(generation,), daemon=True).start()
        return generation

    def _write(self, generation: Generation) -> None:
        self.release.wait(LIMIT)
        for index, text in enumerate(self.texts):
            generation.put(Event(text, 10 + index, ANSWER))
        generation.put(self.end)


@contextmanager
def running(engine: Engine, model: Model, settings: Settings | None = None) -> Iterator[str]:
    """The address of a server on `engine`, which is closed at the end."""
    settings = replace(settings or Settings(), drain_seconds=1)
    app = create_app(engine, model, settings)
    server = make_server(app, settings)
    bound = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address_of(bound)
    finally:
        server.should_exit = True
        app.state.serving.extractions.close()
        engine.close(drain_seconds=0)
        thread.join(LIMIT)


def chat(model: str, **fields: Any) -> dict[str, Any]:
    """A small request body."""
    return {"model": model, "messages": HELLO, "max_tokens": 4, **fields}


def post(address: str, path: str, body: Any, **options: Any) -> httpx.Response:
    """A request with a JSON body."""
    return WEB.post(address + path, json=body, **options)
