"""Where the user's dictionaries lie: one folder for each, under the model that they read."""

from __future__ import annotations

import re
from pathlib import Path

from mlxsteer.errors import SaeError, near_matches
from mlxsteer.files import home_dir
from mlxsteer.sae.dictionary import Dictionary
from mlxsteer.sae.folder import CONFIG, GEMMA_FILES, read


def shelf(key: str) -> Path:
    """Where the dictionaries for a model with that key lie."""
    return home_dir() / "sae" / key


def available(key: str) -> dict[str, Path]:
    """{name: folder} of the dictionaries for a model."""
    folder = shelf(key)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: path for path in found if (path / CONFIG).is_file()}


def find(name: str, key: str) -> Path:
    """The folder of a dictionary, by its path or its name. SaeError when there is none."""
    path = Path(name).expanduser()
    if path.is_dir() or path.name in GEMMA_FILES:
        return path
    known = available(key)
    if name in known:
        return known[name]
    raise SaeError(
        f"There is no dictionary {name!r} for {key}.{near_matches(name, known)}"
        " `mlxsteer sae list` shows them; a folder is given by its path."
    )


def load(name: str, key: str) -> Dictionary:
    """The dictionary of that path or name."""
    return read(find(name, key))


def place_for(name: str, key: str) -> Path:
    """The folder that a dictionary of that name gets. SaeError for a name that cannot be one."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise SaeError(
            f"{name!r} cannot be a dictionary's name: use letters, digits, '-', '_' and '.'."
        )
    return shelf(key) / name
