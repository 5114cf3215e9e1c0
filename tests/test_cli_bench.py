"""`mlxsteer bench graph`: the counts of `launches`, and the bytes of every recipe."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from click.testing import CliRunner, Result

from mlxsteer.cli import main
from mlxsteer.models.deepseek_v4 import launches

STEPS = {
    label: Counter({"Matmul": 10 * place, "Reshape": 99})
    for place, label in enumerate(launches.STEPS, start=1)
}


@pytest.fixture(autouse=True)
def counted_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "decode_launches", lambda rounding: STEPS)


def typed(*words: str) -> Result:
    return CliRunner().invoke(main, ["bench", "graph", *words])


def test_views_are_no_launches() -> None:
    facts = json.loads(typed("--json").stdout)
    assert list(facts["launches"].values()) == [10, 20, 30]
    assert facts["mean_launches"] == (96 * 10 + 31 * 20 + 30) / 128


def test_bytes_read_per_token_are_those_of_the_recipes() -> None:
    facts = json.loads(typed("--json").stdout)
    assert round(facts["bytes_read_per_token"]["lossless"] / 1e9, 2) == 11.40


def test_the_table_ends_each_step_with_its_launches() -> None:
    result = typed()
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if line.startswith("estimated"))
    assert line.split()[-3:] == ["10", "20", "30"]
    assert "Reshape" not in result.stdout
