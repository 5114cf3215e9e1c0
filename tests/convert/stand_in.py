"""A Hub on this machine: enough of its HTTP interface to list, range-read and download a repo.

It can cut a connection after a number of bytes, and counts what was asked for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


class StandIn:
    """A repo `owner/model` served from `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cuts: dict[str, list[int]] = {}  # file name -> bytes until a cut, one per request
        self.wrong_hash: set[str] = set()
        self.sent: Counter[str] = Counter()  # bytes of whole-file answers by file
        self.url = ""

    def describe(self) -> bytes:
        files = [self._file(p) for p in sorted(self.folder.iterdir()) if p.is_file()]
        facts = {"id": "owner/model", "modelId": "owner/model", "sha": COMMIT, "siblings": files}
        return json.dumps(facts).encode()

    def _file(self, path: Path) -> dict[str, object]:
        facts: dict[str, object] = {"rfilename": path.name, "size": path.stat().st_size}
        if path.suffix == ".safetensors":
            facts["lfs"] = {"sha256": self.sha256(path), "size": path.stat().st_size,
                            "pointerSize": 134}  # fmt: skip
        return facts

    def sha256(self, path: Path) -> str:
        if path.name in self.wrong_hash:
            return "0" * 64
        return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def serve(folder: Path) -> Iterator[StandIn]:
    hub = StandIn(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            if path.startswith("/api/models/owner/model"):
                self._send(200, {"Content-Type": "application/json"}, hub.describe(), body)
                return
            file = folder / path.rpartition("/")[2]
            if not path.startswith("/owner/model/resolve/") or not file.is_file():
                self._send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
                return
            self._file(file, body)

        def _file(self, file: Path, body: bool) -> None:
            data = file.read_bytes()
            headers = {
                "ETag": f'"{hub.sha256(file)}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            first, last = 0, len(data) - 1
            if wanted := self.headers.get("Range"):
                begin, _, end = wanted.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(int(end) if end else last, last)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                self._send(206, headers, data[first : last + 1], body, file.name)
            else:
                self._send(200, headers, data, body, file.name)

        def _send(
            self, status: int, headers: dict[str, str], data: bytes, body: bool, name: str = ""
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not body:
                return
            # A range from 0 is a header being read; everything else is a download.
            download = not (self.headers.get("Range") or "").startswith("bytes=0-")
            cuts = hub.cuts.get(name, []) if download else []
            cut = cuts.pop(0) if cuts else None
            self.wfile.write(data[:cut])
            if download and name.endswith(".safetensors"):
                hub.sent[name] += len(data[:cut])
            if cut is not None:
                self.close_connection = True
                self.connection.close()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
