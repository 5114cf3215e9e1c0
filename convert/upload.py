"""A finished result to the Hub. The same call goes on after a stop: files there are skipped."""

from __future__ import annotations

from pathlib import Path

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.hub import first_line, reason
from mlxsteer.convert.sources import RECORD_NAME


def check_account(repo: str) -> None:
    """ConvertError where an upload to `repo` would be refused; asked before hours of work."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        account = huggingface_hub.HfApi().whoami()
    except errors.LocalTokenNotFoundError as error:
        raise ConvertError("--upload needs an account: run `hf auth login` first.") from error
    except Exception as error:  # the client and its HTTP library raise a dozen unrelated kinds
        raise ConvertError(
            f"Cannot ask the Hub who uploads: {first_line(error)}. Log in with `hf auth login`, or"
            " leave out --upload: converting alone needs no account."
        ) from error
    owner, name = repo.split("/")[0], account["name"]
    if owner not in {name, *(group["name"] for group in account.get("orgs", ()))}:
        raise ConvertError(
            f"The Hub knows you as {name}, and {owner} is no organisation of yours. Type --upload"
            f" {name}/NAME, or log in as somebody else with `hf auth login`."
        )


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
            f"{reason(repo, error, 'The upload to')} The result in {folder} is complete on this"
            " machine."
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
