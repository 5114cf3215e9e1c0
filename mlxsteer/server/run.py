"""The server's life: its address, its log, its start, and an end that lets answers finish."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from mlxsteer.errors import MlxsteerError
from mlxsteer.server.observe import JsonLines
from mlxsteer.server.serving import Serving
from mlxsteer.server.settings import Settings

GRACE = 5.0  # seconds beyond the drain, for the last bytes to be sent


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. MlxsteerError when it is taken or none of ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(512)  # so that a second server sees at once that the port is taken
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MlxsteerError(
            f"Cannot serve on {host}:{port}: {reason}. Choose another --port, e.g. --port"
            f" {port + 1 if 0 < port < 65535 else 8081}, or another --host."
        ) from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_to_stderr() -> None:
    """Log lines in JSON; uvicorn's own warnings among them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("mlxsteer.server", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class _Server(uvicorn.Server):
    """Tells the engine to finish when a signal asks the server to stop."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In place of uvicorn's, which raises the signal again in the end and so kills us."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        self._on_stop()


def serve(app: FastAPI, bound: socket.socket, settings: Settings) -> None:
    """Serve until a signal; then answers in progress have `drain_seconds` to finish.

    A second signal ends at once.
    """
    closing: list[threading.Thread] = []

    def stop() -> None:
        serving: Serving = app.state.serving
        app.state.closing = True
        serving.extractions.close()
        thread = threading.Thread(target=serving.engine.close, args=(settings.drain_seconds,))
        thread.start()
        closing.append(thread)

    server = make_server(app, settings, stop)
    server.run(sockets=[bound])
    if not closing:
        stop()
    if server.force_exit:
        app.state.serving.engine.close(drain_seconds=0)
    closing[0].join()


def make_server(
    app: FastAPI, settings: Settings, on_stop: Callable[[], None] = lambda: None
) -> uvicorn.Server:
    """The HTTP server; `on_stop` is called at the first signal."""
    config = uvicorn.Config(
        app,
        http="h11",  # the parser whose limits are known
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=4 * settings.header_bytes,
        timeout_graceful_shutdown=int(settings.drain_seconds + GRACE),
    )
    return _Server(config, on_stop)
