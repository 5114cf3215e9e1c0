"""`mlxsteer serve`: the model behind OpenAI's and Anthropic's APIs, and the panel of sliders."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from mlxsteer.cli.options import dtype_option, force_option, load_model, model_option, steer_option
from mlxsteer.errors import MlxsteerError, UsageError

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.server.engine import Engine

NEEDS = ("fastapi", "uvicorn", "pydantic", "prometheus_client")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)i?B?", re.IGNORECASE)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class Size(click.ParamType):
    """Bytes, as people write them: 500M, 2G, 0."""

    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            self.fail(f"{value!r} is no size. Type e.g. 500M or 2G; 0 is none.", param, ctx)
        return int(float(match["number"]) * 1024 ** _UNITS[match["unit"].upper()])


@click.command("serve")
@model_option
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080,
              help="Port to listen on; 0 takes a free one.")  # fmt: skip
@click.option(
    "--api-key",
    envvar="MLXSTEER_API_KEY",
    help="What clients must send. Needed for addresses that other machines reach. Better given in"
    " MLXSTEER_API_KEY, where no process list shows it.",
)
@click.option("--insecure-no-key", is_flag=True, help="Let other machines in without a key.")
@steer_option
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let the pages of another site call, e.g. http://localhost:3000. May be given several"
    " times.",
)
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="NAME",
    help="A further name of this machine, e.g. behind a proxy. May be given several times.",
)
@click.option("--temp", "temperature", type=click.FloatRange(0, 2), default=0.0,
              help="Of requests that name no temperature.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1), default=2048,
              help="Of requests that name no limit.")  # fmt: skip
@click.option("--max-running", type=click.IntRange(1), default=16,
              help="Answers written at the same time.")  # fmt: skip
@click.option("--max-queued", type=click.IntRange(0), default=64,
              help="Requests that may wait; beyond them come 429s.")  # fmt: skip
@click.option("--cache-size", type=Size(), default="2G",
              help="Memory for prompts that may come again.")  # fmt: skip
@click.option("--disk-cache-size", type=Size(), default="0",
              help="Disk for long ones, which then outlive the server. E.g. 20G.")  # fmt: skip
@click.option("--drain", "drain_seconds", type=click.FloatRange(0), default=30.0,
              help="Seconds that a shutdown waits for answers.")  # fmt: skip
@dtype_option
@force_option
def command(
    model_name: str | None,
    steer: tuple[str, ...],
    max_running: int,
    max_queued: int,
    cache_size: int,
    disk_cache_size: int,
    dtype: str | None,
    force: bool,
    **options: Any,
) -> None:
    """Serve a model over HTTP, steered per request by the field `steer`.

    OpenAI's and Anthropic's clients work unchanged; the panel of sliders is at the printed
    address. Log lines (JSON, without texts) go to stderr.

    \b
    Example:
      mlxsteer serve --model demo --steer terse:2
    """
    _require_extra()
    from mlxsteer.grammar import format as format_terms
    from mlxsteer.grammar import parse
    from mlxsteer.server.run import address_of, listen, log_to_stderr
    from mlxsteer.server.settings import Settings

    terms = [term for text in steer for term in parse(text)]
    settings = Settings(steer=format_terms(terms), **options)
    bound = listen(settings.host, settings.port)
    model = load_model(model_name, dtype, force)
    engine = _engine(model, max_running, max_queued, cache_size, disk_cache_size)
    from mlxsteer.server.app import create_app
    from mlxsteer.server.run import serve

    log_to_stderr()
    app = create_app(engine, model, settings)
    warnings = app.state.serving.prepare()
    engine.start()
    for warning in warnings:
        click.echo(warning, err=True)
    click.echo(f"{model.label} is served at {address_of(bound)} (Ctrl-C stops it)")
    serve(app, bound, settings)


def _require_extra() -> None:
    if any(find_spec(name) is None for name in NEEDS):
        raise MlxsteerError(
            "The server needs packages that are not installed. Type: pip install 'mlxsteer[serve]'"
        )


def _engine(model: Model, running: int, queued: int, cache_size: int, disk_size: int) -> Engine:
    from mlxsteer.files import cache_dir
    from mlxsteer.server.disk import DiskTier
    from mlxsteer.server.engine import Engine
    from mlxsteer.server.prefix import PrefixCache

    if disk_size and not cache_size:
        raise UsageError("--disk-cache-size goes with --cache-size above 0.")
    disk = None
    if disk_size:
        disk = DiskTier(model, cache_dir() / "prompts" / model.key, max_bytes=disk_size)
    cache = PrefixCache(cache_size, disk) if cache_size else None
    return Engine(model, max_running=running, max_queued=queued, prefix_cache=cache)
