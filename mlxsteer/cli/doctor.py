"""`mlxsteer doctor`: is everything here, and does the model respond?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import click

from mlxsteer.cli.options import model_option, print_json, run_options
from mlxsteer.progress import say

if TYPE_CHECKING:
    from mlxsteer.doctor import CheckFunction, Report
    from mlxsteer.model import Model
    from mlxsteer.sites import SiteCheck

Outcome = tuple[str, bool, str]


@click.command("doctor")
@model_option
@click.option("--no-model", is_flag=True, help="Load no model; look at the installation alone.")
@run_options
def command(
    model_name: str | None, no_model: bool, dtype: str | None, force: bool, as_json: bool
) -> None:
    """Check versions, device and memory, and that each site of a model responds to steering.

    A model that is not on this machine is not fetched. Exits 1 when a check fails.

    \b
    Example:
      mlxsteer doctor --model demo
    """
    from mlxsteer.doctor import diagnose

    checks: Sequence[CheckFunction] = ()
    if not no_model and (model_name is not None or _default_is_here()):
        say("Loading the model and shifting each of its sites a little ...")
        checks = ModelChecks(model_name, dtype, force).all
    report = diagnose(model_name, checks)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)
    sys.exit(0 if report.ok else 1)


class ModelChecks:
    """Checks of one model, which is loaded when the first of them runs."""

    def __init__(self, name: str | None, dtype: str | None, force: bool) -> None:
        self._name, self._dtype, self._force = name, dtype, force

    @property
    def all(self) -> list[CheckFunction]:
        from mlxsteer.sites import CHECKED_SITES

        sites = [lambda site=site: self.site(site) for site in CHECKED_SITES]
        return [self.model, *sites, self.zero]

    def model(self) -> Outcome:
        model = self._model
        return "model", True, f"{model.label}: {model.n_layers} layers, width {model.d_model}"

    def site(self, site: str) -> Outcome:
        """Whether a shift at `site` of each layer is read there and changes the logits."""
        found = [check for check in self._checks if check.site == site]
        failed = [check.layer for check in found if not check.ok]
        layers = self._model.n_layers
        if not found:
            return site, site != "residual", "no layer of this model offers this site"
        detail = f"{len(found) - len(failed)} of {layers} layers respond"
        if failed:
            detail += f"; not these: {', '.join(map(str, failed))}"
        elif len(found) < layers:
            detail += f"; the other {layers - len(found)} do not offer this site"
        missing = site == "residual" and len(found) < layers
        return site, not failed and not missing, detail

    def zero(self) -> Outcome:
        from mlxsteer.sites import strength_zero_is_identical

        same = strength_zero_is_identical(self._model)
        detail = "the unsteered model, bit for bit" if same else "differs from the unsteered model"
        return "strength 0", same, detail

    @cached_property
    def _model(self) -> Model:
        from mlxsteer.model import load

        return load(self._name, dtype=self._dtype, force=self._force, allow_download=False)

    @cached_property
    def _checks(self) -> list[SiteCheck]:
        from mlxsteer.sites import check_sites

        return check_sites(self._model)


def _default_is_here() -> bool:
    from mlxsteer.errors import MlxsteerError
    from mlxsteer.models.names import resolve_model

    try:
        resolve_model(None, allow_download=False)
    except MlxsteerError:
        return False  # the report says why, as a warning
    return True


def _print(report: Report) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    facts = {
        "versions": versions,
        "system": report.system,
        "device": report.device,
        "BLAS": report.blas or "as mlx brings it",
        "memory": f"{_gb(report.memory_bytes)}, usable {_gb(report.memory_limit_bytes)}",
        "disk": f"{_gb(report.disk_free_bytes)} free",
        **report.paths,
        "model": report.model or "none found",
    }
    for name, value in facts.items():
        click.echo(f"{name:<11}{value}")
    for check in report.checks:
        click.echo(f"{'ok' if check.ok else 'FAILED':<11}{check.name}: {check.detail}")
    for warning in report.warnings:
        click.echo(f"{'warning':<11}{warning}")


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
