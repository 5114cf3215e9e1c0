"""GET /v1/steering/features: the features of the model's dictionaries, searched by words.

Reads the indexes that `mlxsteer sae train` and `sae index` keep; runs no model. A feature found is
steered with by its `name`, as a vector is.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from mlxsteer.errors import MlxsteerError
from mlxsteer.library import FEATURES
from mlxsteer.sae import index, shelf
from mlxsteer.server.serving import serving_of

router = APIRouter(prefix="/v1/steering", tags=["steering"])
MOST = 100


class FeatureSnippet(BaseModel):
    """A place where the feature fires, around the token that it fires on."""

    before: str
    token: str
    after: str
    activation: float


class FoundFeature(BaseModel):
    """A feature. `density`: share of states on which it fires. `detected`: how well its label is
    told from others on held-out snippets, 0.5 being chance."""

    name: str
    sae: str
    feature: int
    label: str | None
    detected: float | None
    density: float
    maximum: float
    promoted: list[str]
    snippets: list[FeatureSnippet]


class FeatureList(BaseModel):
    """`without_index`: dictionaries that cannot be searched until `mlxsteer sae index NAME`."""

    features: list[FoundFeature]
    saes: list[str]
    without_index: list[str]


@router.get("/features")
def list_features(
    request: Request,
    q: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=MOST)] = 20,
) -> FeatureList:
    """Features whose label, tokens or snippets hold the words of `q`, best first."""
    known = shelf.available(serving_of(request).model.key)
    found: list[FoundFeature] = []
    lacking = []
    for name, path in known.items():
        try:
            searched = index.search(index.read(path), q, limit)
        except MlxsteerError:
            lacking.append(name)
            continue
        found += [FoundFeature(**_facts(name, feature)) for feature in searched]
    return FeatureList(features=found[:limit], saes=list(known), without_index=lacking)


def _facts(name: str, feature: index.Feature) -> dict[str, Any]:
    label = feature.label
    return {
        "name": f"{FEATURES}{name}/{feature.index}",
        "sae": name,
        "feature": feature.index,
        "label": label.text if label else None,
        "detected": label.accuracy if label else None,
        "density": feature.density,
        "maximum": feature.maximum,
        "promoted": list(feature.promoted),
        "snippets": [
            {
                "before": one.before,
                "token": one.token,
                "after": one.after,
                "activation": one.activation,
            }
            for one in feature.snippets
        ],
    }
