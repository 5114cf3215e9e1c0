"""One Python file that brings our V4 module to a plain mlx-lm (`model_file` in config.json).

The package's sources travel as text inside the file and are imported from there, under a name of
their own, so that they work without mlxsteer and beside any version of it.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.sources import read_json
from mlxsteer.files import write_text

MODEL_FILE = "deepseek_v4_mlx.py"
_HOME = "mlxsteer.models.deepseek_v4"
_AWAY = "deepseek_v4_portable"
# The only thing that the package takes from mlxsteer: an exception that carries a message.
_ERRORS = '"""Errors."""\n\n\nclass ModelError(Exception):\n    """A model cannot be used."""\n'

_TEMPLATE = '''"""DeepSeek-V4 for mlx-lm: `mlx_lm.generate --trust-remote-code --model FOLDER`.

The modules below are those of mlxsteer (Apache-2.0), unchanged but for the package name.
"""

import importlib
import importlib.abc
import importlib.util
import sys

NAME = "{name}"
SOURCES = {sources}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `NAME` and its modules from SOURCES."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] != NAME:
            return None
        part = fullname.partition(".")[2] or "__init__"
        if part not in SOURCES:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=part == "__init__")

    def exec_module(self, module):
        part = module.__name__.partition(".")[2] or "__init__"
        exec(compile(SOURCES[part], f"<{{module.__name__}}>", "exec"), module.__dict__)


if not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path):
    sys.meta_path.append(_Finder())

_package = importlib.import_module(NAME)
Model, ModelArgs = _package.Model, _package.ModelArgs
# Saved prompt caches are looked up by class name there.
importlib.import_module("mlx_lm.models.cache").DeepseekV4Cache = _package.DeepseekV4Cache
'''


def make_portable(folder: Path) -> None:
    """Add the file to a finished result, and its name to config.json."""
    write_text(folder / MODEL_FILE, model_file())
    config = {**read_json(folder / "config.json"), "model_file": MODEL_FILE}
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")


def model_file() -> str:
    """The text of the file."""
    sources = {"errors": _ERRORS}
    for file in sorted(resources.files(_HOME).iterdir(), key=lambda f: f.name):
        if file.name.endswith(".py"):
            sources[file.name.removesuffix(".py")] = _moved(file.name, file.read_text("utf-8"))
    return _TEMPLATE.format(name=_AWAY, sources=json.dumps(sources, indent=1, ensure_ascii=True))


def _moved(name: str, text: str) -> str:
    """A module's source with its imports turned to the new package."""
    text = text.replace(_HOME, _AWAY).replace("mlxsteer.errors", f"{_AWAY}.errors")
    if left := re.search(r"^\s*(?:from|import) mlxsteer.*$", text, re.MULTILINE):
        raise ConvertError(
            f"{name} of the V4 module needs the rest of mlxsteer ({left[0].strip()}), so it cannot"
            " be made portable. Please report this; the result itself is not affected."
        )
    return text
