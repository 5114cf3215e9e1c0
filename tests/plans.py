"""A model of six layers and four dimensions as plans see it, and a vector on it."""

from typing import Any

import numpy as np

from mlxsteer.fitting import ModelShape
from mlxsteer.grammar import parse
from mlxsteer.plan import Plan, build
from mlxsteer.vector import Calibration, SteeringVector

D, LAYERS = 4, 6
NORMS = np.array([10, 20, 30, 40, 50, 60], np.float32)
SHARE = np.array([0, 0, 0.25, 0.5, 0.25, 0], np.float32)
SHAPE = ModelShape("tiny", LAYERS, D, lambda: NORMS, {"architecture": "llama", "base_model": "a/b"})
AXIS = np.eye(D, dtype=np.float32)


def no_norms() -> np.ndarray:
    """The norms of a model that must not be asked for them."""
    raise AssertionError("the vector has its own norms")


def terse(**fields: Any) -> SteeringVector:
    """Layers 2 to 4 along the first axis; δ+ 0.4, δ− 0.2."""
    made: dict[str, Any] = {
        "residual_norm": NORMS,
        "layer_share": SHARE,
        "calibration": Calibration(0.4, 0.2),
        **fields,
    }
    return SteeringVector("terse", dict.fromkeys((2, 3, 4), AXIS[0]), LAYERS, **made)


def plan(
    *terms: tuple[str, SteeringVector], shape: ModelShape = SHAPE, force: bool = False
) -> Plan:
    """The plan of (steering text, vector) pairs."""
    return build([(parse(text)[0], vector) for text, vector in terms], shape, force=force)


def lengths(text: str, vector: SteeringVector, **options: Any) -> np.ndarray:
    """[LAYERS] lengths of a plan's only term."""
    return plan((text, vector), **options).terms[0].lengths
