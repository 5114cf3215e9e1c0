"""`mlxsteer convert`: official weights to MLX. Parsing and printing; mlxsteer.convert works.

`convert verify` and `convert importance` are helpers of it; everything else is a source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlxsteer.errors import MlxsteerError, UsageError


class WithHelpers(click.Command):
    """A command whose first word may name a helper: `convert verify DIR` beside `convert SOURCE`.

    A folder called `verify` is still reached as `./verify`.
    """

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        if args and (helper := HELPERS.get(args[0])):
            return helper.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


EPILOG = """\b
Examples:
  mlxsteer convert --list
  mlxsteer convert deepseek-ai/DeepSeek-V4-Flash --recipe q2 --dry-run
  mlxsteer convert ~/DeepSeek-V4-Flash --recipe lossless --out ~/v4-lossless
\b
Helpers:
  mlxsteer convert verify DIR [--against SOURCE]     is a result whole, and true to its source?
  mlxsteer convert importance MODEL --out FILE       measure which columns matter, for --importance
"""


@click.command("convert", cls=WithHelpers, epilog=EPILOG)
@click.argument("source", required=False)
@click.option("--recipe", default="lossless", show_default=True, metavar="NAME|FILE.yaml",
              help="How small: see --list. A .yaml file is a recipe of your own.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path),
              help="Target folder. Default: where --model v4-flash looks for it.")  # fmt: skip
@click.option("--revision", help="Commit, tag or branch of a Hub repo.")
@click.option("--importance", type=click.Path(path_type=Path, dir_okay=False),
              help="Weigh columns by this file (made by `convert importance`).")  # fmt: skip
@click.option("--keep-source/--no-keep-source", default=False, show_default=True,
              help="Keep what was downloaded. A folder of yours is never touched.")  # fmt: skip
@click.option("--portable", is_flag=True,
              help="Also make the folder load in plain mlx-lm (adds a model file).")  # fmt: skip
@click.option("--upload", metavar="OWNER/NAME", help="Upload the result to this Hub repo.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done, in bytes.")
@click.option("--list", "list_recipes", is_flag=True, help="Show all recipes with exact sizes.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(source: str | None, list_recipes: bool, as_json: bool, **options: Any) -> None:
    """Convert DeepSeek-V4-Flash to MLX: lossless or smaller, resumable.

    SOURCE is a folder, a Hub repo (owner/name), or v4-flash. Stopped at any moment, the same
    command goes on at the last verified file.
    """
    if list_recipes:
        _print_list(as_json)
        return
    if source is None:
        raise UsageError(
            "Say what to convert: `mlxsteer convert deepseek-ai/DeepSeek-V4-Flash`, or a folder."
            " `mlxsteer convert --list` shows the recipes."
        )
    _convert(source, as_json, **options)


def _convert(
    name: str,
    as_json: bool,
    *,
    recipe: str,
    out: Path | None,
    revision: str | None,
    importance: Path | None,
    keep_source: bool,
    portable: bool,
    upload: str | None,
    dry_run: bool,
) -> None:
    from mlxsteer.convert.importance import load_importance
    from mlxsteer.convert.open_source import default_out, open_source
    from mlxsteer.convert.plan import make_plan
    from mlxsteer.convert.progress import bar
    from mlxsteer.convert.recipe_file import load_recipe
    from mlxsteer.convert.run import convert

    chosen = load_recipe(recipe)
    target = (out or default_out(name, chosen)).expanduser()
    if dry_run:
        _print_plan(name, revision, chosen, target, keep_source, as_json)
        return
    if upload:
        _check_upload(upload)
    with bar() as progress:
        source = open_source(name, revision, target, keep_source)
        plan = make_plan(source.checkpoint, chosen)
        weights = load_importance(importance, plan) if importance else None
        try:
            result = convert(
                source,
                plan,
                target,
                importance=weights,
                keep_source=keep_source,
                portable=portable,
                progress=progress,
            )
        except KeyboardInterrupt:
            raise MlxsteerError(
                "Stopped. Verified files are kept; the same command goes on from there."
            ) from None
        url = _upload(target, upload, progress) if upload else None
    _print_result(result, as_json, url)


def _print_list(as_json: bool) -> None:
    from mlxsteer.convert.tables import list_json, list_text

    click.echo(json.dumps(list_json(), indent=1) if as_json else list_text())


def _print_plan(
    name: str, revision: str | None, recipe: Any, out: Path, keep_source: bool, as_json: bool
) -> None:
    from mlxsteer.convert.open_source import open_source, repo_of
    from mlxsteer.convert.plan import make_plan
    from mlxsteer.convert.real_model import REPO, real_checkpoint
    from mlxsteer.convert.space import disk_need, free_bytes
    from mlxsteer.convert.tables import plan_json, plan_text

    if repo_of(name) == REPO and revision is None:
        checkpoint = real_checkpoint()  # its inventory is known: no network is needed
    else:
        checkpoint = open_source(name, revision, out, keep_source).checkpoint
    plan = make_plan(checkpoint, recipe)
    need = disk_need(plan, set(), repo_of(name) is not None, keep_source)
    free = free_bytes(out)
    if as_json:
        click.echo(json.dumps(plan_json(plan, need, free, str(out)), indent=1))
    else:
        click.echo(plan_text(plan, need, free, str(out)))


def _print_result(result: Any, as_json: bool, url: str | None) -> None:
    from mlxsteer.convert.tables import error_lines

    if as_json:
        facts = {"out": str(result.out), "bytes": result.nbytes, "files": result.shards}
        facts |= {"resumed": result.resumed, "errors": result.errors, "uploaded": url}
        click.echo(json.dumps(facts, indent=1))
        return
    resumed = f", {result.resumed} of them from an earlier run" if result.resumed else ""
    click.echo(f"{result.out}: {result.nbytes:,} bytes in {result.shards} files{resumed}")
    for line in error_lines(result.errors):
        click.echo(line)
    if url:
        click.echo(f"uploaded to {url}")
    click.echo(f"Try it: mlxsteer chat --model {result.out}")


def _check_upload(name: str) -> None:
    from mlxsteer.convert.checkpoint import REPO_NAME
    from mlxsteer.convert.upload import check_account

    if not REPO_NAME.fullmatch(name):
        raise UsageError(f"--upload takes OWNER/NAME, not {name!r}.")
    check_account(name)


def _upload(folder: Path, repo: str, progress: Any) -> str:
    from mlxsteer.convert.upload import upload

    progress.status(f"uploading to {repo}")
    return upload(folder, repo)


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--against", metavar="SOURCE", help="Compare with the weights it was made of.")
@click.option("--all", "everything", is_flag=True, help="Every file and tensor, not a sample.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify_command(folder: Path, against: str | None, everything: bool, as_json: bool) -> None:
    """Check a converted FOLDER: inventory, hashes, and with --against its values.

    Example: mlxsteer convert verify ~/v4-lossless --against ~/DeepSeek-V4-Flash --all
    """
    from dataclasses import asdict

    from mlxsteer.convert.open_source import open_source
    from mlxsteer.convert.progress import bar
    from mlxsteer.convert.verify import verify

    with bar() as progress:
        source = open_source(against, None, folder, keep_source=True) if against else None
        report = verify(folder, source, everything=everything, progress=progress)
    if as_json:
        click.echo(json.dumps({**asdict(report), "ok": report.ok}, indent=1))
    else:
        click.echo(f"{report.tensors:,} tensors in {report.files} files, {report.hashed} hashed")
        if against:
            click.echo(f"{report.compared:,} compared, {report.exact:,} matrices bit for bit")
        for kind, error in report.errors.items():
            click.echo(f"{kind}: relative RMS error {100 * error:.3f}%")
        for problem in report.problems:
            click.echo(f"WRONG: {problem}")
        click.echo("good" if report.ok else "not good")
    if not report.ok:
        raise click.exceptions.Exit(1)


@click.command("importance")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Texts, one per paragraph. Default: the bundled contrast sets.")  # fmt: skip
@click.option("--tokens", default=16384, show_default=True, type=click.IntRange(min=1),
              help="Measure on at most this many tokens.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def importance_command(
    model: Path, out: Path, prompts: Path | None, tokens: int, as_json: bool
) -> None:
    """Measure which columns matter, on a converted MODEL, for `convert --importance`.

    One pass over the texts, one layer in memory at a time: works on a Mac smaller than the model.

    Example: mlxsteer convert importance ~/v4-lossless --out v4-importance.safetensors
    """
    from mlxsteer.convert.collect import collect, read_texts, tokenise
    from mlxsteer.convert.importance import save_importance
    from mlxsteer.convert.progress import bar
    from mlxsteer.convert.sources import read_json

    read_json(model / "config.json")
    ids = tokenise(model, read_texts(prompts), tokens)
    with bar() as progress:
        moments, measured = collect(model, ids, progress)
    save_importance(out, moments, measured, model.resolve().name)
    facts = {"out": str(out), "tokens": measured, "texts": len(ids), "matrices": len(moments)}
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo(f"{out}: {len(moments)} matrices measured on {measured:,} tokens")
        click.echo(f"Use it: mlxsteer convert SOURCE --recipe q2 --importance {out}")


HELPERS: dict[str, click.Command] = {
    "verify": verify_command,
    "importance": importance_command,
}
