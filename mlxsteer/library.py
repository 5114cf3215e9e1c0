"""Names become vectors: a path, the user's, the bundled ones, features, a Hub repo, or a set.

Owns where vectors lie and in which order they are looked for; reading them is `vectorfile`'s.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from mlxsteer.errors import MlxsteerError, VectorError, near_matches
from mlxsteer.files import home_dir
from mlxsteer.progress import say

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.vector import SteeringVector

SUFFIX = ".safetensors"
FEATURES = "sae/"  # begins the names of features of a dictionary
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<name>[\w.-]+)\Z")


def model_key(label: str) -> str:
    """A model's folder name among vectors: `demo`, `owner--repo`, or a folder's own name."""
    path = Path(label).expanduser()
    if path.is_absolute() or label.startswith(".") or path.is_dir():
        label = path.resolve().name
    return re.sub(r"[^\w.-]+", "--", label).strip("-.") or "model"


def plain_name(name: str) -> str:
    """`name` without the characters that steering text cannot hold."""
    return name.replace('"', "'").strip() or "vector"


def user_dir(key: str) -> Path:
    """Where the user's vectors for a model lie."""
    return home_dir() / "vectors" / key


def own_path(name: str, key: str) -> Path:
    """Where a changed vector goes: its own file, else the user's vectors for the model."""
    path = Path(name).expanduser()
    if path.suffix == SUFFIX:
        return path
    if name.startswith(FEATURES):
        from mlxsteer.sae import features

        return features.kept_path(features.resolve(name, key), key)
    # A Hub vector keeps its name behind the colon, a foreign file its own without the ending.
    plain = name.rpartition(":")[2] if ":" in name else name
    plain = path.stem if is_path(plain) else plain
    check_name(plain)
    return user_dir(key) / f"{plain}{SUFFIX}"


def bundled_dir(key: str) -> Path:
    """Where the vectors that ship for a model lie (may not exist)."""
    try:
        return Path(str(resources.files("mlxsteer.vectors"))) / key
    except ModuleNotFoundError:  # run from a checkout that is not installed
        return Path(__file__).parent.parent / "vectors" / key


def available(key: str) -> dict[str, Path]:
    """{name: path} of the vectors for a model; the user's hide bundled ones of the same name."""
    found: dict[str, Path] = {}
    for folder in (bundled_dir(key), user_dir(key)):
        if folder.is_dir():
            found |= {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}
    return dict(sorted(found.items()))


def find(name: str, key: str) -> SteeringVector:
    """The vector called `name` for the model with `key`. VectorError when there is none."""
    vector = _find(name, key)
    if vector is None:
        raise VectorError(_unknown(name, key))
    return vector


def find_or_extract(name: str, model: Model) -> SteeringVector:
    """The vector called `name`, extracted now from its contrast set when there is none yet.

    An extracted vector is kept among the user's. Raises VectorError for an unknown name.
    """
    from mlxsteer import contrast

    vector = _find(name, model.key)
    if vector is not None:
        return vector
    if name not in contrast.available():
        raise VectorError(_unknown(name, model.key))
    say(f"No vector {name!r} for {model.label} yet; extracting it from its contrast set.")
    vector = model.extract(name)
    save(vector, model.key)
    return vector


def save(vector: SteeringVector, key: str, name: str | None = None) -> Path:
    """Keep `vector` among the user's vectors for a model; returns its path."""
    name = name or vector.name
    check_name(name)
    return vector.save(user_dir(key) / f"{name}{SUFFIX}")


def check_name(name: str) -> None:
    """VectorError when a vector called `name` could not be kept, or not be found again."""
    if not re.fullmatch(r"\w[\w.-]*", name) or is_path(name):
        raise VectorError(
            f"{name!r} cannot be a vector's name: use letters, digits, '-', '_' and '.', a letter"
            " or digit first, and no file ending."
        )


def _find(name: str, key: str) -> SteeringVector | None:
    from mlxsteer.vector import SteeringVector

    if is_path(name):
        return SteeringVector.load(Path(name).expanduser())
    if (path := available(key).get(name)) is not None:
        return SteeringVector.load(path)
    if name.startswith(FEATURES):
        from mlxsteer.sae import features

        return features.find(name, key)
    if match := _HUB_NAME.match(name):
        from mlxsteer.hubvectors import pull

        return SteeringVector.load(pull(match["repo"], match["name"], key))
    return None


def is_path(name: str) -> bool:
    """Whether `name` means a file rather than a vector's name."""
    looks = name.startswith((".", "~", "/")) or Path(name).suffix in (
        SUFFIX,
        ".gguf",
        ".f32",
        ".npz",
        ".pt",
        ".pth",
        ".pkl",
        ".bin",
    )
    return looks and not _HUB_NAME.match(name)


def _unknown(name: str, key: str) -> str:
    from mlxsteer import contrast

    try:
        sets = contrast.available()
    except MlxsteerError:
        sets = []
    known = sorted({*available(key), *sets})
    return (
        f"There is no vector or contrast set called {name!r}.{near_matches(name, known)}"
        f" `mlxsteer vectors list` shows the vectors;"
        f" a file is given by its path (./{model_key(name)}{SUFFIX})."
    )
