"""A training run on disk: everything that decides its next step, in one file.

Parameters, Adam's moments, how long each feature has been silent, and the step. The order of the
data follows from the recipe's seed and the step, so a run that goes on is the run that was not
interrupted, bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxsteer.errors import SaeError
from mlxsteer.files import atomic_path
from mlxsteer.sae.objective import Params


@dataclass
class State:
    """step: steps done. optimizer: Adam's state. silent: int32 [F], states since each feature
    last fired. log: one row of figures for every so many steps."""

    step: int
    params: Params
    optimizer: dict[str, Any]
    silent: mx.array
    log: list[dict[str, float]]


def save(state: State, path: Path, run: str) -> None:
    """Write `state` to `path`, whole or not at all; `run` names the recipe and data."""
    arrays = {f"params.{name}": array for name, array in state.params.items()}
    moments: Any = tree_flatten(state.optimizer)
    arrays |= {f"optimizer.{name}": array for name, array in moments}
    arrays["silent"] = state.silent
    facts = {"step": state.step, "run": run, "log": state.log}
    with atomic_path(path) as temporary:
        mx.save_safetensors(str(temporary), arrays, {"mlxsteer": json.dumps(facts)})


def load(path: Path, run: str) -> State | None:
    """The state at `path`; None when there is none. SaeError when it is of another run."""
    if not path.is_file():
        return None
    try:
        found: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = found
        facts = json.loads(metadata["mlxsteer"])
        if facts["run"] != run:
            raise SaeError(
                f"{path} is of a run with other settings or data. Add --restart to begin anew."
            )
        params = {k.removeprefix("params."): v for k, v in arrays.items() if k[:7] == "params."}
        moments = [(k.removeprefix("optimizer."), v) for k, v in arrays.items() if k[:4] == "opti"]
        optimizer: Any = tree_unflatten(moments)
        return State(int(facts["step"]), params, optimizer, arrays["silent"], facts["log"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise SaeError(f"{path} is damaged ({error}). Add --restart to begin anew.") from None
