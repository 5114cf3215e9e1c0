"""The doctor's report: complete, serialisable, and never stopped by what it finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxsteer import _blas, doctor
from mlxsteer.doctor import diagnose
from mlxsteer.errors import ModelError
from mlxsteer.models import memory


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path / "home"))
    return tmp_path


def test_report_names_versions_device_paths_and_models(homes):
    report = diagnose()
    assert {"mlxsteer", "python", "mlx", "mlx-lm", "numpy"} == set(report.versions)
    assert report.device.startswith(("CPU", "Metal"))
    assert report.memory_bytes == memory.physical_memory()
    assert report.disk_free_bytes > 0
    assert report.paths["cache"] == str(homes / "cache")
    assert report.models == [doctor.FoundModel("demo", None)]
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_converted_folders_and_aliases_are_found(homes):
    names = ["DeepSeek-V4-Flash-2bit", "other"]
    for name in names:
        (homes / "cache/models" / name).mkdir(parents=True)
        config = homes / "cache/models" / name / "config.json"
        config.write_text(json.dumps({"model_type": "deepseek_v4"}))
    (homes / "home").mkdir()
    (homes / "home/config.yaml").write_text("aliases: {mine: owner/repo}\n")
    found = {model.name: model.path for model in diagnose().models}
    assert found["v4-flash"] == str(homes / "cache/models" / names[0])
    assert str(homes / "cache/models/other") in found
    assert found["mine"] == "owner/repo"


def test_unresolved_model_is_a_warning():
    report = diagnose("dmeo")
    assert report.model is None
    assert any("Did you mean 'demo'" in warning for warning in report.warnings)


def test_broken_settings_are_a_warning(homes):
    (homes / "home").mkdir()
    (homes / "home/config.yaml").write_text("model: [")
    assert any("config.yaml" in warning for warning in diagnose().warnings)


def test_checks_are_run_and_a_failing_one_is_reported():
    def sites():
        raise ModelError("layer 3 does not respond")

    def never():
        raise AssertionError("builds on the check before it")

    report = diagnose(checks=[lambda: ("logits", True, "finite"), sites, never])
    assert report.checks == [
        ("logits", True, "finite"),
        ("sites", False, "layer 3 does not respond"),
    ]
    assert not report.ok


def test_slow_blas_is_a_warning_on_linux(monkeypatch):
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(_blas, "_loaded", None)
    assert any("BLAS" in warning for warning in diagnose().warnings)


def test_short_disk_and_missing_pip_are_warnings_while_the_demo_is_not_here(monkeypatch):
    monkeypatch.setattr(doctor, "_disk_free", lambda: 1_000_000)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    warnings = " ".join(diagnose().warnings)
    assert "1 MB are free" in warnings
    assert "ensurepip" in warnings
