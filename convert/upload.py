"""A finished result to the Hub. The same call goes on after a stop: files there are skipped."""

from __future__ import annotations

from pathlib import Path

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.hub import reason
from mlxsteer.convert.sources import RECORD_NAME


def upload(folder: Path, repo: str) -> str:
    """Upload `folder` to the model repo `repo`, made when missing. Returns its address.

    One commit per file: what was sent before an interruption is not sent again.
    """
    import huggingface_hub

    if not (folder / RECORD_NAME).is_file():
        raise ConvertError(f"{folder} is not a finished conversion. Convert it first.")
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        there = {f.rfilename: f for f in api.model_info(repo, files_metadata=True).siblings or ()}
        for path in _in_order(folder):
            if not _same(path, there.get(path.name)):
                api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo)
    except Exception as error:  # the client and its HTTP library raise a dozen unrelated kinds
        raise ConvertError(
            f"{reason(repo, error)} The result in {folder} is complete on this machine."
        ) from error
    return str(url)


def _in_order(folder: Path) -> list[Path]:
    """Weights first, config.json last: an unfinished upload is no model."""
    files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    return sorted(files, key=lambda p: (p.name == "config.json", _small(p), p.name))


def _small(path: Path) -> bool:
    return path.suffix != ".safetensors"


def _same(path: Path, remote: object) -> bool:
    """The repo has this file already. Small files are always sent: it costs nothing."""
    from mlxsteer.convert.shard_file import file_sha256

    lfs = getattr(remote, "lfs", None)
    if lfs is None or lfs.size != path.stat().st_size:
        return False
    return bool(lfs.sha256 == file_sha256(path))
