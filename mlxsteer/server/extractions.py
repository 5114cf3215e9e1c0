"""Vectors made in the background: one at a time, on the engine's thread, between its steps."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mlxsteer import contrast, library
from mlxsteer.contrast import ContrastSet
from mlxsteer.errors import MlxsteerError
from mlxsteer.progress import reporting
from mlxsteer.server.engine import Engine
from mlxsteer.server.errors import ApiError

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.vector import SteeringVector

State = Literal["queued", "running", "done", "failed", "cancelled"]
MAX_WAITING = 8
MAX_KEPT = 64  # of those that are over; older ones are forgotten

log = logging.getLogger("mlxsteer.server")


class _Cancelled(Exception):
    """The client no longer wants the vector."""


@dataclass(frozen=True)
class Wanted:
    """A vector to make: of a contrast set, with these numbers."""

    contrast: ContrastSet
    pairs: int
    calibrate: bool


@dataclass
class Extraction:
    """One vector in the making. stage, done, total: what is being done, and how far it is."""

    wanted: Wanted
    id: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex[:16]}")
    state: State = "queued"
    stage: str = ""
    done: int = 0
    total: int = 0
    error: str | None = None
    created: float = field(default_factory=time.time)
    cancelled: bool = False

    @property
    def name(self) -> str:
        return self.wanted.contrast.name

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class Extractions:
    """The line of vectors to be made for one model."""

    def __init__(self, engine: Engine, model: Model) -> None:
        self.engine = engine
        self.model = model
        self._jobs: dict[str, Extraction] = {}
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mlxsteer-extract")

    def start(self, wanted: Wanted) -> Extraction:
        """Put a vector in line. ApiError 429 when the line is full, 409 when it is in it."""
        job = Extraction(wanted)
        with self._lock:
            waiting = [other for other in self._jobs.values() if not other.over]
            if any(other.name == job.name for other in waiting):
                raise ApiError(
                    409, f"{job.name!r} is being made already.", code="exists", param="name"
                )
            if len(waiting) >= MAX_WAITING:
                raise ApiError(
                    429,
                    f"{len(waiting)} vectors are waiting to be made. Try again in a minute.",
                    code="queue_full",
                    headers={"Retry-After": "60"},
                )
            over = [other.id for other in self._jobs.values() if other.over]
            for id in over[: max(0, len(over) - MAX_KEPT)]:
                del self._jobs[id]
            self._jobs[job.id] = job
        self._worker.submit(self._run, job)
        return job

    def get(self, id: str) -> Extraction:
        """The job of this id; ApiError 404 when there is none."""
        job = self._jobs.get(id)
        if job is None:
            raise ApiError(404, f"There is no job {id[:80]!r}.", code="unknown_job", param="id")
        return job

    def listed(self) -> list[Extraction]:
        """All jobs that are remembered, the oldest first."""
        return list(self._jobs.values())

    def cancel(self, id: str) -> Extraction:
        """Stop a job at its next step; nothing happens to one that is over."""
        job = self.get(id)
        job.cancelled = True
        if job.state == "queued":
            job.state = "cancelled"
        return job

    def close(self) -> None:
        """Stop what is being made."""
        for job in self.listed():
            job.cancelled = True
        self._worker.shutdown(wait=False, cancel_futures=True)

    # --- the work ----------------------------------------------------------------------------

    def _run(self, job: Extraction) -> None:
        if job.over:
            return
        try:
            self.engine.run_between(lambda: self._make(job)).result()
            job.state = "done"
        except _Cancelled:
            job.state = "cancelled"
        except MlxsteerError as error:
            job.state, job.error = "failed", str(error)
        except Exception as error:
            log.error("extraction failed", exc_info=error)
            job.state = "failed"
            job.error = "The server failed while making this vector; its log says why."

    def _make(self, job: Extraction) -> SteeringVector:
        """The vector, made and kept. Runs on the engine's thread and lets answers go on."""
        from mlxsteer.calibrate import calibrate
        from mlxsteer.extract import extract

        job.state = "running"

        def listen(label: str, done: int, total: int) -> None:
            job.stage, job.done, job.total = label, done, total
            if job.cancelled:
                raise _Cancelled
            self.engine.breathe()

        wanted = job.wanted
        with reporting(listen):
            listen(f"Reading {job.name}", 0, 0)
            vector = extract(self.model, wanted.contrast, pairs=wanted.pairs)
            if wanted.calibrate:
                vector = calibrate(self.model, vector)
        library.save(replace(vector, name=job.name), self.model.key)
        return vector


def wanted_of(
    name: str,
    positive: str | None,
    negative: str | None,
    description: str | None,
    pairs: int,
    calibrate: bool,
) -> Wanted:
    """What a request asks for: two instructions, or the name of a known contrast set."""
    library.check_name(name)
    if positive is None and negative is None:
        if name not in contrast.available():
            raise ApiError(
                404,
                f"There is no contrast set {name!r}. Give two instructions, `positive` and"
                " `negative`, to make your own.",
                code="unknown_contrast_set",
                param="name",
            )
        return Wanted(ContrastSet.load(name), pairs, calibrate)
    if not positive or not negative or positive.strip() == negative.strip():
        raise ApiError(
            400,
            "Give two different instructions: `positive`, for more of the trait, and `negative`.",
            code="invalid_value",
            param="negative",
        )
    return Wanted(_own_set(name, positive, negative, description), pairs, calibrate)


def _own_set(name: str, positive: str, negative: str, description: str | None) -> ContrastSet:
    data: dict[str, Any] = {
        "name": name,
        "description": (description or f"{positive} / {negative}")[:500],
        "labels": {"positive": positive[:80], "negative": negative[:80]},
        "combine": "append",
        "questions": "common",
        "held_out": "common",
        "positive": [positive],
        "negative": [negative],
        "metric": {"name": "words"},
    }
    return ContrastSet.from_dict(data)
