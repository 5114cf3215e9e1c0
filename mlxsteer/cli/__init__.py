"""The command line: a group whose commands are imported when they are run.

A command's file only parses and prints; the work is in the API. Results go to stdout, progress
and notes to stderr; exit status 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import Any

import click

import mlxsteer
from mlxsteer.errors import MlxsteerError, UsageError, near_matches

# name → (one line of help, shown without importing the command)
COMMANDS = {
    "chat": "Talk to a model, steered; one shot with -p.",
    "extract": "Make a vector from a contrast set, or from a document.",
    "calibrate": "Find how far a vector can go and stay coherent.",
    "sweep": "See what a vector does over doses, layers, sites or methods.",
    "evaluate": "Measure whether a vector does what its name says.",
    "sae": "Train, look at and exchange sparse autoencoders.",
    "vectors": "List, show, compare, explain, exchange and combine vectors.",
    "serve": "OpenAI's and Anthropic's APIs on a steered model, and a panel of sliders.",
    "models": "List the models at hand; fetch one.",
    "convert": "Convert official DeepSeek-V4-Flash weights to MLX.",
    "bench": "Count what DeepSeek-V4-Flash costs per decoded token.",
    "doctor": "Check the installation and whether a model's sites respond.",
    "demo": "One question answered plainly, tersely and verbosely.",
}


class LazyGroup(click.Group):
    """Finds commands by name in this package; prints an MlxsteerError as one message."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"mlxsteer.cli.{name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(
                f"There is no command {args[0]!r}.{near_matches(args[0], COMMANDS)}"
                " `mlxsteer --help` lists them."
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MlxsteerError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2 if isinstance(error, UsageError) else 1)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of a pipe has left: click ends without a word
            _drop_unwritten()
            click.echo(f"Error: {_sentence(error)}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)


def _sentence(error: OSError) -> str:
    reason = error.strerror or str(error)
    where = error.filename if error.filename is not None else "stdout"
    return f"{where}: {reason}. Nothing else was changed; mend that and run the command again."


def _drop_unwritten() -> None:
    """What a full disk did not take from stdout would fail again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(mlxsteer.__version__, prog_name="mlxsteer")
def main() -> None:
    """Turn a language model's own internal directions up or down.

    \b
    First steps:
      mlxsteer demo
      mlxsteer chat --model demo --steer terse:3

    Strength 1 is a hint, 3 is clear, 5 is the edge; negative is the opposite.
    """


def run() -> None:
    """`python -m mlxsteer`."""
    main(prog_name="mlxsteer")
