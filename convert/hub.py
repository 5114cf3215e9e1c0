"""A Hub repo as a source: headers by range request, then one shard at a time, resumable.

Without `keep_source` shards are downloaded into the target's own work folder and deleted once
they are converted and verified. With it they go to the Hub's cache, where other tools find them.
A shard that is in that cache already is read there and never deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlxsteer.convert.checkpoint import (
    INDEX_NAME,
    SIDE_FILES,
    Checkpoint,
    ShardFile,
    check_against_index,
    check_weight_map,
)
from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.headers import MAX_HEADER, TensorEntry, parse_header
from mlxsteer.convert.layout import refuse_other_models
from mlxsteer.convert.progress import SILENT, Progress
from mlxsteer.convert.sources import read_json

HEADER_GUESS = 300_000  # bytes; a layer's header has 1,576 entries of about 120


class HubSource:
    """A repo at one commit. `downloads_to` None means the Hub's cache (nothing is deleted)."""

    downloads = True

    def __init__(self, repo: str, revision: str | None, downloads_to: Path | None):
        self._repo = repo
        self._downloads_to = downloads_to
        info = self._ask(lambda hub: hub.HfApi().model_info(
            repo, revision=revision, files_metadata=True
        ))  # fmt: skip
        self._commit: str = info.sha
        files = {file.rfilename: file for file in info.siblings or ()}
        config = read_json(self.side_file("config.json"))
        refuse_other_models(config)
        tensors, shards = self._headers(files)
        self.checkpoint = Checkpoint(
            name=repo,
            config=config,
            tensors=tensors,
            shards=shards,
            side_files=tuple(name for name in SIDE_FILES if name in files),
            revision=info.sha,
        )

    def fetch(self, shard: str, progress: Progress) -> None:
        """Download a shard unless it is here.

        Over plain HTTP a later run goes on where one was cut. With Xet, which is faster, the Hub's
        client keeps nothing of a cut file, so a stop costs the download of one shard at most.
        """
        if self._cached(shard) or self._whole(shard):
            return
        self._sweep()
        size = self.checkpoint.shards[shard].nbytes
        bar = _status_bar(progress, shard, size)
        folder = self._downloads_to
        if folder is not None and not _has_xet():
            self._ask(lambda hub: self._download(hub, folder / shard, size, bar))
            return
        self._ask(lambda hub: hub.hf_hub_download(
            self._repo, shard, revision=self._commit, local_dir=folder, tqdm_class=bar
        ))  # fmt: skip

    def _download(self, hub: Any, target: Path, size: int, bar: Any) -> None:
        """Append to what an earlier run got of a file; it has its name when it is whole."""
        from huggingface_hub.file_download import http_get

        partial = target.with_name(f"{target.name}.part")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as file:
            http_get(
                hub.hf_hub_url(self._repo, target.name, revision=self._commit),
                file,
                resume_size=file.tell(),
                headers=hub.utils.build_hf_headers(),
                expected_size=size,
                tqdm_class=bar,
            )
        partial.replace(target)

    def locate(self, shard: str) -> Path:
        if cached := self._cached(shard):
            return cached
        if self._downloads_to is None:
            raise ConvertError(f"{shard} has left the Hub's cache. Run the same command again.")
        return self._downloads_to / shard

    def release(self, shard: str) -> None:
        """Delete our own download; what the Hub's cache holds stays."""
        if self._downloads_to is not None:
            (self._downloads_to / shard).unlink(missing_ok=True)

    def side_file(self, name: str) -> Path:
        """A small file, through the Hub's cache."""
        found = self._ask(lambda hub: hub.hf_hub_download(
            self._repo, name, revision=self._commit, tqdm_class=_status_bar(SILENT, name, 0)
        ))  # fmt: skip
        return Path(found)

    def _sweep(self) -> None:
        """Remove what a killed download left in our own folder: the client starts a new file."""
        if self._downloads_to is not None:
            for stale in self._downloads_to.rglob("*.incomplete"):
                stale.unlink()

    def _whole(self, shard: str) -> bool:
        path = self._downloads_to and self._downloads_to / shard
        size = self.checkpoint.shards[shard].nbytes
        return bool(path and path.is_file() and path.stat().st_size == size)

    def _cached(self, shard: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self._repo, shard, revision=self._commit)
        return Path(found) if isinstance(found, str) else None

    def _headers(
        self, files: Mapping[str, Any]
    ) -> tuple[dict[str, TensorEntry], dict[str, ShardFile]]:
        """All tensors, from the first bytes of every shard that holds more than a draft block."""
        where = f"{INDEX_NAME} of {self._repo}"
        weight_map = check_weight_map(read_json(self.side_file(INDEX_NAME)), where)
        used = {n: s for n, s in weight_map.items() if not n.startswith("mtp.")}
        tensors: dict[str, TensorEntry] = {}
        shards = {}
        for shard in sorted(set(used.values())):
            if shard not in files:
                raise ConvertError(f"{where} names {shard}, which the repo does not have.")
            file = files[shard]
            sha256 = file.lfs.sha256 if file.lfs else None
            shards[shard] = ShardFile(shard, int(file.size or 0), sha256)
            tensors.update(self._header(shard))
        check_against_index(used, tensors, where)
        return tensors, shards

    def _header(self, shard: str) -> dict[str, TensorEntry]:
        where = f"{shard} of {self._repo}"
        start = self._range(shard, HEADER_GUESS)
        length = int.from_bytes(start[:8], "little")
        if not 2 <= length <= MAX_HEADER:
            raise ConvertError(f"{where} is not a safetensors file.")
        if len(start) < 8 + length:
            start = self._range(shard, 8 + length)
        try:
            header = json.loads(start[8 : 8 + length])
        except ValueError as error:
            raise ConvertError(f"{where} has a damaged header ({error}).") from error
        return parse_header(header, shard, 8 + length, where)

    def _range(self, shard: str, count: int) -> bytes:
        """The first `count` bytes of a file."""

        def get(hub: Any) -> bytes:
            url = hub.hf_hub_url(self._repo, shard, revision=self._commit)
            headers = {**hub.utils.build_hf_headers(), "Range": f"bytes=0-{count - 1}"}
            answer = hub.utils.get_session().get(url, headers=headers, follow_redirects=True)
            hub.utils.hf_raise_for_status(answer)
            return bytes(answer.content[:count])

        return bytes(self._ask(get))

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        import huggingface_hub

        try:
            return question(huggingface_hub)
        except Exception as error:  # the client and its HTTP library raise a dozen unrelated kinds
            raise ConvertError(reason(self._repo, error)) from error


def _has_xet() -> bool:
    """As the Hub's client decides it: its Xet package is there, and not switched off."""
    from huggingface_hub import constants

    return find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET


def reason(repo: str, error: Exception, what: str = "The download from") -> str:
    """A failed request, as what happened and what to type."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo} asks its readers to accept terms first: do so, run `hf auth login`, retry."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"There is no repo {repo} that you may read. Check the name, or `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision. Check --revision."
    if isinstance(error, OSError) and error.errno == 28:
        return f"The disk filled up while {repo} was downloaded. Free space, then run it again."
    return (
        f"{what} {repo} stopped: {first_line(error)}. Finished files are kept; run the same"
        " command to go on."
    )


def first_line(error: Exception) -> str:
    """What the Hub's client says, without the pages that may follow."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _status_bar(progress: Progress, name: str, size: int) -> Any:
    """A tqdm class for the Hub client that reports percent through our own progress."""
    from huggingface_hub.utils import tqdm

    class StatusBar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})
            self._have, self._said = int(kwargs.get("initial") or 0), -1

        def update(self, n: float | None = 1) -> bool | None:
            self._have += int(n or 0)
            percent = 100 * self._have // size if size else 100
            if percent // 5 != self._said // 5:
                self._said = percent
                progress.status(f"downloading {Path(name).stem}: {percent}%")
            return None

    return StatusBar
