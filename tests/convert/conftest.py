"""What the converter's tests share: the tiny official checkpoint, and one conversion of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxsteer.convert.plan import make_plan
from mlxsteer.convert.recipe_file import load_recipe
from mlxsteer.convert.recipes import Recipe
from mlxsteer.convert.run import Result, convert
from mlxsteer.convert.sources import LocalSource

FIXTURES = Path(__file__).parents[1] / "fixtures" / "convert"
TINY = FIXTURES / "tiny_fp8fp4"


def run(source: Path, out: Path, recipe: Recipe | str = "lossless", **options: object) -> Result:
    """Convert a folder with a built-in recipe or one made here."""
    local = LocalSource(source)
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return convert(local, make_plan(local.checkpoint, chosen), out, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint in a built-in recipe; made once, not to be changed."""
    base = tmp_path_factory.mktemp("converted")

    def make(recipe: str) -> Path:
        if not (base / recipe).exists():
            run(TINY, base / recipe, recipe)
        return base / recipe

    return make


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to spoil."""
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))
