"""`python -m mlxsteer`."""

from mlxsteer.cli import run

run()
