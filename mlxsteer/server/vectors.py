"""Vectors by name for requests: never a path, a Hub name or work that a request did not ask for.

Owns which names a request may use and what clients are told of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxsteer import contrast, library
from mlxsteer.errors import MlxsteerError, near_matches
from mlxsteer.grammar import Term, parse
from mlxsteer.probe import Probe, probe_of
from mlxsteer.server.errors import ApiError
from mlxsteer.vector import EDGE, SteeringVector

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.plan import Plan

MAX_TERMS = 16


class Vectors:
    """The vectors of one model, read when first used and again when their file changes."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._read: dict[Path, tuple[int, SteeringVector]] = {}

    def names(self) -> dict[str, Path]:
        """{name: file} of the user's and the bundled vectors."""
        return library.available(self.model.key)

    def get(self, name: str, param: str = "steer", status: int = 400) -> SteeringVector:
        """The vector called `name`; ApiError with `status` when there is none."""
        if name.startswith(library.FEATURES) and name not in self.names():
            return self._feature(name, param, status)
        path = self.names().get(name)
        if path is None:
            raise _unknown(name, self.names(), param, status)
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            raise _unknown(name, self.names(), param, status) from None
        known = self._read.get(path)
        if known is None or known[0] != changed:
            known = self._read[path] = (changed, SteeringVector.load(path))
        return known[1]

    def _feature(self, name: str, param: str, status: int) -> SteeringVector:
        from mlxsteer.sae import features

        try:
            return features.find(name, self.model.key)
        except MlxsteerError as error:
            raise ApiError(status, str(error), code="unknown_vector", param=param) from None

    def terms(self, text: str) -> list[tuple[Term, SteeringVector]]:
        """The terms of a steering text with their vectors."""
        try:
            terms = parse(text)
        except MlxsteerError as error:
            raise ApiError(400, str(error), code="invalid_steering", param="steer") from None
        if len(terms) > MAX_TERMS:
            raise ApiError(
                400,
                f"The steering has {len(terms)} terms; at most {MAX_TERMS} are taken.",
                code="invalid_steering",
                param="steer",
            )
        return [(term, self.get(term.name)) for term in terms]

    def plan(self, text: str) -> Plan:
        """The plan of a steering text whose names are all known here."""
        pairs = self.terms(text)
        from mlxsteer.plan import build

        try:
            plan = build(pairs, self.model.shape)
            self.model.hooks.require(plan.places)
        except MlxsteerError as error:
            raise ApiError(400, str(error), code="invalid_steering", param="steer") from None
        return plan

    def probes(self, names: Sequence[str]) -> tuple[Probe, ...]:
        """What reads the directions of the vectors called `names`."""
        try:
            found = [probe_of(self.get(name, "meter"), self.model.shape) for name in names]
        except MlxsteerError as error:
            raise ApiError(400, str(error), code="invalid_meter", param="meter") from None
        # A file may hold another name than its own; clients know only the latter.
        return tuple(replace(probe, name=name) for probe, name in zip(found, names, strict=True))

    def lack_norms(self, text: str, meters: Sequence[str]) -> bool:
        """Whether a vector here needs the model's residual norms and they are not measured yet."""
        if "residual_norm" in vars(self.model):
            return False
        used = [vector for _, vector in self.terms(text)]
        used += [self.get(name, "meter") for name in meters]
        return any(vector.residual_norm is None for vector in used)

    # --- what clients are told -------------------------------------------------------------

    def facts(self, name: str) -> dict[str, Any]:
        """A vector as GET /v1/steering/vectors shows it."""
        vector = self.get(name, "name", 404)
        about = vector.about
        calibrated = vector.calibration is not None
        safe = 1.0 if vector.op == "project" else EDGE if calibrated else None
        source = self._source(name)
        return {
            "name": name,
            "description": str(about.get("description") or "")
            or (self._feature_description(name) if source == "feature" else ""),
            "positive_label": about.get("positive_label"),
            "negative_label": about.get("negative_label"),
            "op": vector.op,
            "site": vector.site,
            "layers": list(vector.layers),
            "positions": vector.positions,
            "calibrated": calibrated,
            "delta_plus": vector.delta(1),
            "delta_minus": vector.delta(-1),
            "safe_min": None if safe is None else -safe,
            "safe_max": safe,
            "source": source,
            "group": "yours" if source == "user" else str(about.get("group") or "bundled"),
            "tags": [str(tag) for tag in about.get("tags") or []],
            "evaluation": _summary(about.get("eval")),
            "verdict": verdict_of(vector),
        }

    def _source(self, name: str) -> str:
        path = self.names().get(name)
        if path is None:
            return "feature"
        return "user" if library.user_dir(self.model.key) in path.parents else "bundled"

    def _feature_description(self, name: str) -> str:
        """A feature's label, else the tokens that it promotes; empty where it has no index."""
        from mlxsteer.sae import features, index, shelf

        key = self.model.key
        feature = features.resolve(name, key)
        try:
            known = index.read(shelf.available(key)[feature.dictionary]).features
        except MlxsteerError:
            return ""
        if (found := known.get(feature.index)) is None:
            return ""
        return (
            found.label.text if found.label else " ".join(token.strip() for token in found.promoted)
        )

    def listed(self) -> list[dict[str, Any]]:
        """The facts of every vector that can be read."""
        found = []
        for name in self.names():
            try:
                found.append(self.facts(name))
            except MlxsteerError as error:
                found.append({"name": name, "error": str(error)})
            except ApiError:
                continue  # removed while we read
        return found


def verdict_of(vector: SteeringVector) -> str:
    """What is known of how far the vector goes, in a sentence."""
    if vector.op == "project":
        return "A projection: strength is the share removed, 0 to 1."
    found = vector.calibration
    if found is None:
        return f"Uncalibrated: strength 5 is taken as dose {vector.delta(1):g}."
    return (
        f"Calibrated: coherent up to dose {found.delta_plus:g} (strength 5) and"
        f" {found.delta_minus:g} (strength -5)."
    )


def _summary(evaluation: Any) -> dict[str, Any] | None:
    """What an evaluation found, without its tables."""
    if not isinstance(evaluation, dict):
        return None
    return {key: evaluation.get(key) for key in ("verdict", "sentence", "strength", "metric")}


def _unknown(name: str, names: dict[str, Path], param: str, status: int) -> ApiError:
    sets = _sets()
    if name in sets:
        message = (
            f"There is no vector {name!r} for this model yet, but a contrast set of that name."
            f' Make the vector: POST /v1/steering/vectors {{"name": "{name}"}}'
        )
    else:
        near = near_matches(name, {*names, *sets})
        message = f"There is no vector called {name!r}.{near} GET /v1/steering/vectors lists them."
    return ApiError(status, message, code="unknown_vector", param=param)


def _sets() -> list[str]:
    try:
        return contrast.available()
    except MlxsteerError:
        return []
