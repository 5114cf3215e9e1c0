"""The package as it is installed: what is in the wheel, how fast it answers, what it imports."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked files."""
    copy = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        source = ROOT / name
        if source.is_file() and not name.startswith("tests/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(source.read_bytes())
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(out), str(copy)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_the_converter_the_prompts_and_the_vectors(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "mlxsteer/convert/__init__.py" in names
    assert "mlxsteer/models/deepseek_v4/__init__.py" in names
    for folder in ("prompts", "vectors"):
        shipped = {
            f"mlxsteer/{path.relative_to(ROOT)}"
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".yaml", ".safetensors")
        }
        assert shipped
        assert shipped <= names


def test_wheel_holds_every_module_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mlxsteer").rglob("*.py")}
    modules |= {f"mlxsteer/{path.relative_to(ROOT)}" for path in (ROOT / "convert").glob("*.py")}
    assert modules <= names


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("mlxsteer/", "mlxsteer-")) for name in names)


@pytest.mark.slow
def test_installed_wheel_runs_the_demo_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([str(venv / "bin/pip"), "install", "-q", str(wheel)], check=True)
    home = {**os.environ, "HOME": str(tmp_path), "MLXSTEER_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        [str(venv / "bin/mlxsteer"), "demo"],
        cwd=tmp_path, env=home, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "terse:3" in result.stdout


def test_help_answers_within_a_third_of_a_second_of_cpu() -> None:
    before = os.times()
    subprocess.run([sys.executable, "-m", "mlxsteer", "--help"], check=True, capture_output=True)
    after = os.times()
    used = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    assert used < 0.3


def test_help_imports_neither_mlx_nor_numpy_nor_transformers() -> None:
    loaded = _python(
        "import sys\nfrom click.testing import CliRunner\nfrom mlxsteer.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "print([m for m in ('mlx.core', 'numpy', 'transformers', 'torch') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_package_never_imports_torch() -> None:
    sources = [*(ROOT / "mlxsteer").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    offenders = [
        path.name
        for path in sources
        if any(
            line.strip().startswith(("import torch", "from torch"))
            for line in path.read_text().splitlines()
        )
    ]
    assert not offenders
