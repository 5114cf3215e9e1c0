"""GET /v1/steering/features: the features of the model's dictionaries, searched by words.

Reads the indexes that `mlxsteer sae train` and `sae index` keep; runs no model. A feature found is
steered with by its `name`, as a vector is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from mlxsteer.errors import MlxsteerError
from mlxsteer.library import FEATURES
from mlxsteer.sae import index, shelf
from mlxsteer.server.serving import serving_of

router = APIRouter(prefix="/v1/steering", tags=["steering"])
MOST = 100
FURTHEST = 10_000  # that a list goes on to: dictionaries have up to a million features


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
    """more: whether the list goes on (ask again with a larger `offset`). saes: the model's
    dictionaries. without_index: those that cannot be searched until `mlxsteer sae index NAME`."""

    features: list[FoundFeature]
    more: bool
    saes: list[str]
    without_index: list[str]


@router.get("/features")
def list_features(
    request: Request,
    q: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=MOST)] = 20,
    offset: Annotated[int, Query(ge=0, le=FURTHEST)] = 0,
) -> FeatureList:
    """Features whose label, tokens or snippets hold the words of `q`, or whose number it is.

    Best first; of several dictionaries in turns. Without `q` the labelled ones, then the others
    by their largest activation.
    """
    known = shelf.available(serving_of(request).model.key)
    ranked, lacking = [], []
    for name, path in known.items():
        try:
            found = _search(index.read(path), q.strip(), offset + limit + 1)
        except MlxsteerError:
            lacking.append(name)
            continue
        ranked.append([_facts(name, feature) for feature in found])
    merged = [facts for rank in zip_longest(*ranked) for facts in rank if facts is not None]
    past = offset + limit
    return FeatureList(
        features=[FoundFeature(**facts) for facts in merged[offset:past]],
        more=len(merged) > past,
        saes=list(known),
        without_index=lacking,
    )


def _search(known: index.Index, text: str, count: int) -> Sequence[index.Feature]:
    """What `index.search` finds, and first the feature whose number was typed."""
    found = index.search(known, text, count)
    number = int(text) if text.isdecimal() else None
    if number is None or number not in known.features:
        return found
    return [known.features[number], *(one for one in found if one.index != number)][:count]


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
