"""A report on this machine and installation: what is there, what is slow, what is missing.

It reads and measures nothing of a model itself: whoever asks passes checks of their own (such
as whether each site responds) and finds their results in the report.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import mlxsteer
from mlxsteer import _blas
from mlxsteer.errors import MlxsteerError
from mlxsteer.files import cache_dir, home_dir
from mlxsteer.models import demo, memory, names

PACKAGES = ("mlx", "mlx-lm", "numpy")
DEMO_DISK_BYTES = 350_000_000  # wheel, GGUF and converted folder, for a moment together


class Check(NamedTuple):
    """The outcome of one check: what was checked, whether it holds, and what was seen."""

    name: str
    ok: bool
    detail: str


CheckFunction = Callable[[], tuple[str, bool, str]]


@dataclass(frozen=True)
class FoundModel:
    """A model that `--model` could name now; `path` is None when it is yet to be fetched."""

    name: str
    path: str | None


@dataclass(frozen=True)
class Report:
    """What `diagnose` found. Sizes are bytes; `warnings` are sentences for the user."""

    versions: dict[str, str]
    system: str
    device: str
    blas: str | None
    memory_bytes: int
    memory_limit_bytes: int
    disk_free_bytes: int
    paths: dict[str, str]
    model: str | None
    models: list[FoundModel]
    checks: list[Check]
    warnings: list[str]

    @property
    def ok(self) -> bool:
        """Whether every check passed; warnings alone do not count against it."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            **asdict(self),
            "checks": [check._asdict() for check in self.checks],
            "ok": self.ok,
        }


def diagnose(model_name: str | None = None, checks: Sequence[CheckFunction] = ()) -> Report:
    """Look at this installation, resolve `model_name` without fetching it, run `checks`.

    Never raises for what it finds: a model that does not resolve is a warning, and a check that
    raises MlxsteerError has failed; those after it build on it and are not run.
    """
    warnings: list[str] = []
    why = _why(model_name, warnings)
    device = _device(warnings)
    disk_free = _disk_free()
    warnings += _machine_warnings(disk_free)
    checked = list(_run(checks))
    told = [check.detail for check in checked if not check.ok]
    return Report(
        versions=_versions(),
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        device=device,
        blas=_blas.loaded(),
        memory_bytes=memory.physical_memory(),
        memory_limit_bytes=_memory_limit(),
        disk_free_bytes=disk_free,
        paths=_paths(),
        model=why,
        models=_models(),
        checks=checked,
        warnings=[warning for warning in warnings if warning not in told],
    )


def _run(checks: Sequence[CheckFunction]) -> Iterator[Check]:
    for check in checks:
        try:
            yield Check(*check())
        except MlxsteerError as error:
            yield Check(getattr(check, "__name__", "check"), False, str(error))
            return


def _versions() -> dict[str, str]:
    versions = {"mlxsteer": mlxsteer.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    return versions


def _device(warnings: list[str]) -> str:
    try:
        import mlx.core as mx
    except ImportError as error:
        warnings.append(f"mlx cannot be imported ({error}). Reinstall it: `pip install -U mlx`.")
        return "none"
    info = mx.device_info()
    kind = "Metal" if mx.metal.is_available() else "CPU"
    if sys.platform == "darwin" and kind == "CPU":
        warnings.append(
            "This Mac's GPU is not used: mlx sees no Metal. An Intel Python (run under Rosetta)"
            " is the usual cause; `python -c 'import platform; print(platform.machine())'` must"
            " print arm64."
        )
    return f"{kind} ({info.get('device_name', 'unnamed')})"


def _memory_limit() -> int:
    try:
        return memory.memory_limit().nbytes
    except ImportError:  # no mlx: already warned of
        return memory.physical_memory()


def _disk_free() -> int:
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _machine_warnings(disk_free: int) -> list[str]:
    warnings = []
    if sys.platform == "linux" and _blas.loaded() is None:
        warnings.append(
            "mlx computes float32 products with its reference BLAS, about 40 times slower than"
            " OpenBLAS. Install it (Debian, Ubuntu: `apt install libopenblas0-pthread`), or set"
            " MLXSTEER_BLAS to the library's file; import mlxsteer before mlx."
        )
    if demo.is_made(demo.demo_folder()):
        return warnings
    if disk_free < DEMO_DISK_BYTES:
        warnings.append(
            f"{disk_free / 1e6:.0f} MB are free in {cache_dir()}; the demo model needs"
            f" {DEMO_DISK_BYTES / 1e6:.0f} MB. Free some, or set MLXSTEER_CACHE."
        )
    if importlib.util.find_spec("pip") is None:
        warnings.append(
            f"This Python has no pip, which fetches the demo model. Run `{sys.executable} -m"
            " ensurepip` (with uv: `uv pip install pip`)."
        )
    return warnings


def _why(model_name: str | None, warnings: list[str]) -> str | None:
    try:
        return names.resolve_model(model_name, allow_download=False).why
    except MlxsteerError as error:
        warnings.append(str(error))
        return None


def _paths() -> dict[str, str]:
    return {
        "cache": str(cache_dir()),
        "home": str(home_dir()),
        "settings": str(names.settings_file()),
    }


def _models() -> list[FoundModel]:
    made = demo.demo_folder()
    found = [FoundModel(names.DEMO, str(made) if demo.is_made(made) else None)]
    converted = names.v4_flash_folders()
    found += [FoundModel(names.V4_FLASH, str(path)) for path in converted[:1]]
    listed = {made, *converted[:1]}
    found += [FoundModel(str(path), str(path)) for path in _other_folders() if path not in listed]
    try:
        aliases = names.user_settings().get("aliases", {})
    except MlxsteerError:
        return found  # the broken file is already a warning
    return found + [FoundModel(str(name), str(target)) for name, target in aliases.items()]


def _other_folders() -> list[Path]:
    models = cache_dir() / "models"
    configs = sorted(models.glob("*/config.json"))
    return [file.parent for file in configs if not file.parent.name.startswith(".")]
