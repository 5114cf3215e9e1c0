"""What users call a model, and the folder that it means: alias, folder, Hub repo or default.

Imports no mlx, so that a wrong name is answered at once. `loading` reads the folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxsteer.errors import ModelError, near_matches
from mlxsteer.files import cache_dir, home_dir
from mlxsteer.models import demo
from mlxsteer.models.folder import read_config

DEMO = "demo"
V4_FLASH = "v4-flash"
ALIASES = (DEMO, V4_FLASH)
V4_FLASH_FOLDERS = "DeepSeek-V4-Flash*"
REPO_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class ResolvedModel:
    """A folder to load. `label` names the model in messages and vector files; `why` is a sentence
    that says how the name led here; `revision` is a Hub commit or the demo file's checksum."""

    path: Path
    label: str
    alias: str | None
    revision: str | None
    why: str


def resolve_model(name: str | None, *, allow_download: bool = True) -> ResolvedModel:
    """Find the model that `name` means; None is the user's default.

    Order: alias, folder, Hub repo. `allow_download=False` finds only what is on this machine.
    Raises ModelError naming near matches when nothing fits.
    """
    if name is None:
        return _default(allow_download)
    settings = user_settings()
    if target := settings.get("aliases", {}).get(name):
        found = _located(str(target), allow_download)
        why = f"{name} is {target} in {settings_file()}."
        return ResolvedModel(found.path, found.label, name, found.revision, why)
    return _located(name, allow_download)


def _default(allow_download: bool) -> ResolvedModel:
    if chosen := user_settings().get("model"):
        found = resolve_model(str(chosen), allow_download=allow_download)
        why = f"No --model given: using {chosen}, the default in {settings_file()}."
    elif V4_FLASH in user_settings().get("aliases", {}) or v4_flash_folders():
        found = resolve_model(V4_FLASH, allow_download=allow_download)
        why = f"No --model given: using the converted V4-Flash in {found.path}."
    else:
        found = _demo(allow_download)
        why = f"No --model given and no V4-Flash converted: using the demo model, {demo.LABEL}."
    return ResolvedModel(found.path, found.label, found.alias, found.revision, why)


def _located(name: str, allow_download: bool) -> ResolvedModel:
    if name == DEMO:
        return _demo(allow_download)
    if name == V4_FLASH:
        return _v4_flash()
    path = Path(name).expanduser()
    if path.is_dir():
        label = path.resolve().name
        return ResolvedModel(path, label, None, None, f"{name} is a folder.")
    if path.is_file():
        raise ModelError(f"{path} is a file. Give the model's folder: {path.parent}")
    if REPO_NAME.fullmatch(name) and not path.parent.is_dir():
        from mlxsteer.models.hub import fetch_model

        snapshot, commit = fetch_model(name, allow_download=allow_download)
        return ResolvedModel(snapshot, name, None, commit, f"{name} is a Hub repo.")
    raise ModelError(_unknown(name, path))


def _unknown(name: str, path: Path) -> str:
    if "/" in name or name.startswith((".", "~")):
        siblings = _folder_names(path.parent)
        return (
            f"There is no folder {name}.{near_matches(path.name, siblings)} --model takes a"
            f" folder, a Hub repo (owner/name) or one of: {', '.join(ALIASES)}."
        )
    own = user_settings().get("aliases", {})
    known = [*ALIASES, *own, *_folder_names(Path())]
    return (
        f"There is no model {name!r}.{near_matches(name, known)} --model takes a folder, a Hub"
        f" repo (owner/name) or one of: {', '.join([*ALIASES, *own])}."
    )


def _folder_names(parent: Path) -> list[str]:
    try:
        return [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _demo(allow_download: bool) -> ResolvedModel:
    if not allow_download and not demo.is_made(demo.demo_folder()):
        raise ModelError("The demo model is not here yet. Run `mlxsteer models pull demo`.")
    path = demo.demo_path()
    revision = f"sha256:{demo.GGUF_SHA256[:16]}"
    return ResolvedModel(path, demo.LABEL, DEMO, revision, f"demo is {demo.LABEL}.")


def v4_flash_folders() -> list[Path]:
    """Converted V4-Flash folders in the cache, the newest first."""
    found = [
        path for path in (cache_dir() / "models").glob(V4_FLASH_FOLDERS) if _is_v4_folder(path)
    ]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _is_v4_folder(path: Path) -> bool:
    try:
        return read_config(path)["model_type"] == "deepseek_v4"
    except ModelError:
        return False  # another program's folder, or a conversion that has not finished


def _v4_flash() -> ResolvedModel:
    folders = v4_flash_folders()
    if not folders:
        raise ModelError(
            f"There is no converted DeepSeek-V4-Flash in {cache_dir() / 'models'}. Run `mlxsteer"
            " convert deepseek-ai/DeepSeek-V4-Flash` (--list shows what fits this Mac), or name its"
            f" folder in {settings_file()}: `aliases: {{v4-flash: FOLDER}}`."
        )
    path = folders[0]
    why = f"v4-flash is {path.name}" + (", the newest converted." if folders[1:] else ".")
    return ResolvedModel(path, path.name, V4_FLASH, None, why)


def settings_file() -> Path:
    """The user's settings: `model`, their default, and `aliases`, names for folders or repos."""
    return home_dir() / "config.yaml"


def user_settings() -> dict[str, Any]:
    """The settings file's contents, empty when there is none. ModelError when it is broken."""
    file = settings_file()
    if not file.is_file():
        return {}
    import yaml

    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not valid YAML: {error}. Correct it.") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("aliases", {}), dict):
        raise ModelError(
            f"{file} must be a mapping such as `model: demo`, and `aliases`, if there, a mapping"
            " of names to folders or Hub repos."
        )
    return settings
