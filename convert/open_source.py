"""From the word SOURCE on the command line to a source, and from a source to a target folder."""

from __future__ import annotations

from pathlib import Path

from mlxsteer.convert import real_model
from mlxsteer.convert.checkpoint import REPO_NAME
from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.hub import HubSource
from mlxsteer.convert.journal import WORK_DIR
from mlxsteer.convert.recipes import Recipe
from mlxsteer.convert.sources import LocalSource, Source
from mlxsteer.files import cache_dir

ALIASES = {"v4-flash": real_model.REPO}
DOWNLOADS = "download"


def repo_of(text: str) -> str | None:
    """The Hub repo that `text` means, or None when it is a folder."""
    if text in ALIASES:
        return ALIASES[text]
    if Path(text).expanduser().exists():
        return None
    return text if REPO_NAME.fullmatch(text) else None


def open_source(text: str, revision: str | None, out: Path, keep_source: bool) -> Source:
    """The source that `text` names: a folder, `v4-flash`, or a Hub repo."""
    if repo := repo_of(text):
        return HubSource(repo, revision, None if keep_source else out / WORK_DIR / DOWNLOADS)
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise ConvertError(
            f"There is no folder {text}, and it is not a Hub repo (owner/name). Try"
            f" `mlxsteer convert {real_model.REPO}`."
        )
    if revision is not None:
        raise ConvertError(
            f"{text} is a folder, which has no revisions. Leave --revision out, or name a Hub repo."
        )
    return LocalSource(folder)


def default_out(text: str, recipe: Recipe) -> Path:
    """Where a result goes without --out: where `--model v4-flash` looks for it."""
    name = Path(repo_of(text) or Path(text).expanduser().resolve()).name
    return cache_dir() / "models" / f"{name}-{recipe.name}"
