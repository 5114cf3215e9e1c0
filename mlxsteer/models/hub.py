"""Models from the Hub: config and tokenizer first, weights only when those can be used.

Owns which files are asked for and what a failed download tells the user. Downloads resume and
become visible whole: huggingface_hub's cache sees to both.
"""

from __future__ import annotations

from pathlib import Path

from mlxsteer.errors import ModelError
from mlxsteer.models import folder as folders

# Never *.py, never *.bin: neither code nor pickles come in.
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "tiktoken.model", "*.tiktoken", "*.txt"]
WEIGHT_FILES = [folders.WEIGHTS]


def fetch_model(repo: str, *, allow_download: bool = True) -> tuple[Path, str]:
    """The local snapshot folder of `repo` and its commit; progress goes to stderr.

    ModelError when it cannot be fetched, is refused by name, wants code to be run, or holds no
    safetensors.
    """
    path = _snapshot(repo, SMALL_FILES, allow_download)
    folders.check_config(path)
    path = _snapshot(repo, SMALL_FILES + WEIGHT_FILES, allow_download)
    if not any(path.glob(folders.WEIGHTS)):
        raise ModelError(
            f"{repo} has no safetensors weights ({folders.WEIGHTS}), and nothing else is read:"
            " a pickle (.bin, .pt) can run code. Look for a safetensors or MLX copy of the model."
        )
    return path, path.name


def _snapshot(repo: str, patterns: list[str], allow_download: bool) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, allow_patterns=patterns, local_files_only=not allow_download
            )
        )
    except Exception as error:  # the client and its HTTP library raise a dozen unrelated kinds
        raise ModelError(_reason(repo, error, allow_download)) from error


def _reason(repo: str, error: Exception, allow_download: bool) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        if not allow_download:
            return f"{repo} is not on this machine yet. Run `mlxsteer models pull {repo}`."
        return (
            f"The Hub cannot be reached, and {repo} is not (wholly) on this machine. Check the"
            " network and run the command again; what is already here is kept."
        )
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} asks its readers to accept terms first. Accept them on its page, run"
            " `hf auth login`, then the command again."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is no folder {repo!r} here, and no repo of that name on the Hub that you may"
            " read. Check the spelling; for a private repo run `hf auth login` first."
        )
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"Cannot fetch {repo} from the Hub: {first_line}. Run the command again; what is already"
        " here is kept."
    )
