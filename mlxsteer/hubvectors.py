"""Vectors on the Hub: `owner/repo:name` is `<model>/<name>.safetensors`, or `<name>.safetensors`.

Owns which file is asked for and what a failed transfer tells the user. What comes down is data
to check: the caller reads it with `vectorfile`, which refuses anything that is not a vector.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from mlxsteer.errors import MlxsteerError, UsageError, VectorError, near_matches
from mlxsteer.vector import SteeringVector

SUFFIX = ".safetensors"
_REPO = re.compile(r"[\w.-]+/[\w.-]+\Z")
_NAME = re.compile(r"[\w-][\w.-]*\Z")


def split_name(text: str) -> tuple[str, str]:
    """(repo, name) of `owner/repo:name`. UsageError for anything else."""
    repo, colon, name = text.partition(":")
    if not colon or not _REPO.match(repo) or not _NAME.match(name):
        raise UsageError(f"{text!r} names no vector on the Hub. Type owner/repo:name.")
    return repo, name


def push(
    vector: SteeringVector, repo: str, key: str, *, name: str | None = None, private: bool = False
) -> str:
    """Upload `vector` for the model `key`, making the repo if need be; returns its Hub name."""
    from huggingface_hub import HfApi

    name = name or vector.name
    _, name = split_name(f"{repo}:{name}")
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        path = vector.save(Path(folder) / f"{name}{SUFFIX}")
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_file(
                path_or_fileobj=path.read_bytes(),
                path_in_repo=f"{key}/{name}{SUFFIX}",
                repo_id=repo,
                commit_message=f"Steering vector {name} for {key}",
            )
        except Exception as error:  # the client and its HTTP library raise a dozen kinds
            raise _failure("upload", repo, error) from error
    return f"{repo}:{name}"


def pull(repo: str, name: str, key: str, *, revision: str | None = None) -> Path:
    """The local path of `repo:name`, fetched if need be; the file for the model `key` first.

    Raises VectorError when the repo has no such vector, MlxsteerError when it cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    split_name(f"{repo}:{name}")
    for file in (f"{key}/{name}{SUFFIX}", f"{name}{SUFFIX}"):
        try:
            return Path(hf_hub_download(repo, file, revision=revision))
        except LocalEntryNotFoundError as error:  # offline: a kind of EntryNotFoundError
            raise _failure("download", repo, error) from error
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise _failure("download", repo, error) from error
    raise VectorError(_missing(repo, name, key, revision))


def _missing(repo: str, name: str, key: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repo, revision=revision)
    except Exception:  # the list only helps with the spelling
        files = []
    found = sorted(file.removesuffix(SUFFIX) for file in files if file.endswith(SUFFIX))
    near = near_matches(name, {file.rpartition("/")[2] for file in found})
    held = f" It has {', '.join(found[:8])}." if found else ""
    return f"{repo} has no vector {name!r} for {key}.{near}{held} Check the name and --model."


def _failure(what: str, repo: str, error: Exception) -> MlxsteerError:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        why = "the Hub cannot be reached. Check the network and run the command again"
    elif isinstance(error, errors.GatedRepoError):
        why = "it asks its readers to accept terms first. Accept them on its page, then try again"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = "there is no such repo that you may use. Check the name, or run `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = "it has no such revision. Check --revision"
    else:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        why = f"{why}. For an upload, `hf auth login` first" if what == "upload" else why
    return MlxsteerError(f"Cannot {what} with {repo}: {why}.")
