"""What a running server is allowed to do and by default does."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from mlxsteer.errors import UsageError

MIB = 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """Limits and defaults of the HTTP side; the engine has its own.

    api_key: what clients must send (None: nothing). steer: the steering of requests that name
    none. allow_origins: pages elsewhere that may call; `*` is all. allow_hosts: names beyond
    localhost and addresses by which the server may be called. temperature, max_tokens: of
    requests that do not say. body_bytes, header_bytes, body_seconds: what a request may weigh
    and how long its body may take. keep_alive: seconds of silence after which a stream says
    that it lives. drain_seconds: how long a shutdown waits for answers.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    insecure_no_key: bool = False
    steer: str = ""
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    temperature: float = 0.0
    max_tokens: int = 2048
    body_bytes: int = 8 * MIB
    header_bytes: int = 16 * 1024
    body_seconds: float = 30.0
    keep_alive: float = 5.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise UsageError("The API key is empty or not ASCII. Give e.g. a long hex number.")
        if not self.local and not self.api_key and not self.insecure_no_key:
            raise UsageError(
                f"Serving on {self.host} lets other machines in, so it needs a key: add --api-key"
                " or set MLXSTEER_API_KEY. To go without one, add --insecure-no-key."
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
