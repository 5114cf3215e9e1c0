"""/v1/steering: the vectors, making new ones, and moving the sliders of a running answer.

For a page or program that wants sliders:

1. GET /v1/steering/status: the model, its memory, how busy it is, the default steering.
2. GET /v1/steering/vectors: one slider each, −5…5 (−1…1 where `op` is project); the part from
   `safe_min` to `safe_max` is known to stay coherent, and nothing is known where they are null.
3. POST /v1/chat/completions with `stream: true` and `"steer": "terse:3, formal:-1"`; the response
   header `X-Mlxsteer-Generation` names the answer. Each chunk with text carries `steer`, the
   steering under which its last token was computed, and, with `"meter": ["terse"]`, `readings`:
   one {vector: number} for each token of the chunk (0 is about the negative pole, 1 about the
   positive one).
4. PATCH /v1/steering/generations/{id} `{"steer": "terse:-2"}` while it streams: the reply says
   from which token on (counted from 0) the answer obeys.
5. POST /v1/steering/vectors to make one; GET /v1/steering/jobs/{id} until its `state` is done,
   failed or cancelled; then its `vector` says how far it goes.

Steering is always one line of the same grammar: `name:strength`, commas between terms.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from mlxsteer import contrast, library
from mlxsteer.errors import MlxsteerError
from mlxsteer.server.errors import ApiError
from mlxsteer.server.extractions import Extraction, wanted_of
from mlxsteer.server.jobs import Generation
from mlxsteer.server.schemas import Body
from mlxsteer.server.serving import Serving, serving_of

router = APIRouter(prefix="/v1/steering", tags=["steering"])


# --- status ----------------------------------------------------------------------------------


class SteeringStatus(BaseModel):
    """The model and how busy it is. Memory in bytes; steer: the default steering."""

    model: str
    n_layers: int
    d_model: int
    context_length: int | None
    can_think: bool
    can_call_tools: bool
    steer: str
    running: int
    prefilling: int
    queued: int
    max_running: int
    max_queued: int
    tokens_per_second: float
    active_memory: int
    peak_memory: int
    prefix_entries: int
    prefix_bytes: int


@router.get("/status")
async def status(request: Request) -> SteeringStatus:
    """The served model, its memory, and how busy it is."""
    from mlxsteer import prompting

    serving = serving_of(request)
    model, engine = serving.model, serving.engine.status()
    shared = SteeringStatus.model_fields.keys() & set(vars(engine))
    return SteeringStatus(
        model=model.label,
        n_layers=model.n_layers,
        d_model=model.d_model,
        context_length=model.context_length,
        can_think=prompting.can_think(model),
        can_call_tools=prompting.can_call_tools(model),
        steer=serving.settings.steer,
        **{name: getattr(engine, name) for name in shared},
    )


# --- vectors ---------------------------------------------------------------------------------


class Vector(BaseModel):
    """A vector. layers are 0-based.

    delta_plus, delta_minus: the dose that strength 5 and -5 mean (a default where not
    `calibrated`). safe_min, safe_max: the strengths within which answers stay coherent; null where
    that was never measured. verdict: the same in a sentence. source: `user`, `bundled`, or
    `feature` (of a dictionary: had by its name, in no list). group, tags: to sort a long list by.
    evaluation: verdict, sentence, strength and metric of a measurement, if the file holds one.
    """

    name: str
    description: str
    positive_label: str | None
    negative_label: str | None
    op: Literal["add", "project", "clamp"]
    site: str
    layers: list[int]
    positions: str
    calibrated: bool
    delta_plus: float
    delta_minus: float
    safe_min: float | None
    safe_max: float | None
    source: Literal["user", "bundled", "feature"]
    group: str
    tags: list[str]
    evaluation: Any
    verdict: str


class Unreadable(BaseModel):
    """A vector file that cannot be used, and why."""

    name: str
    error: str


class VectorList(BaseModel):
    """vectors: ready. unreadable: files that cannot be used. sets: contrast sets without a vector
    yet; POST /v1/steering/vectors {"name": SET} makes one."""

    model: str
    vectors: list[Vector]
    unreadable: list[Unreadable]
    sets: list[str]


@router.get("/vectors")
async def list_vectors(request: Request) -> VectorList:
    """Every vector of the model, and the contrast sets that could become one."""
    serving = serving_of(request)
    found = await serving.apart(serving.vectors.listed)
    ready = [Vector(**facts) for facts in found if "error" not in facts]
    names = {facts["name"] for facts in found}
    return VectorList(
        model=serving.model.label,
        vectors=ready,
        unreadable=[Unreadable(**facts) for facts in found if "error" in facts],
        sets=[name for name in contrast.available() if name not in names],
    )


@router.get("/vectors/{name:path}")
async def get_vector(request: Request, name: str) -> Vector:
    """One vector, or a feature as one: `sae/full/3643`, `sae/full/3643/clamp`."""
    serving = serving_of(request)
    return Vector(**await serving.apart(lambda: serving.vectors.facts(name)))


class NewVector(Body):
    """A vector to make: the name of a contrast set, or a new name and two instructions.

    The instructions are added to everyday questions and must differ in the trait alone, e.g.
    "Answer like a pirate." and "Answer plainly.". pairs: how many contrasts to read. calibrate:
    also find how far it can go (longer; its strengths are then safe from -5 to 5). replace: take
    the place of a vector of the user's with this name.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$", max_length=64)]
    positive: Annotated[str | None, Field(min_length=1, max_length=2000)] = None
    negative: Annotated[str | None, Field(min_length=1, max_length=2000)] = None
    description: Annotated[str | None, Field(max_length=500)] = None
    pairs: Annotated[int, Field(ge=2, le=400)] = 100
    calibrate: bool = True
    replace: bool = False


class ExtractionJob(BaseModel):
    """A vector in the making. stage, done, total: what is being done now, and how far it is
    (total 0: not known yet). error: why it failed. vector: what was made, once it is done."""

    id: str
    name: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    stage: str
    done: int
    total: int
    created: float
    error: str | None
    vector: Vector | None


@router.post("/vectors", status_code=202)
async def create_vector(request: Request, body: NewVector) -> ExtractionJob:
    """Start making a vector in the background; answers in progress go on meanwhile."""
    serving = serving_of(request)
    own = library.user_dir(serving.model.key) / f"{body.name}{library.SUFFIX}"
    if own.exists() and not body.replace:
        raise ApiError(
            409,
            f"You have a vector {body.name!r} already. Choose another name, or add"
            ' "replace": true.',
            code="exists",
            param="name",
        )
    wanted = await serving.apart(
        lambda: wanted_of(
            body.name,
            body.positive,
            body.negative,
            body.description,
            body.pairs,
            body.calibrate,
        )
    )
    return await _job(serving, serving.extractions.start(wanted))


@router.get("/jobs")
async def list_jobs(request: Request) -> list[ExtractionJob]:
    """The vectors in the making, and those that were made since the server started."""
    serving = serving_of(request)
    return [await _job(serving, job) for job in serving.extractions.listed()]


@router.get("/jobs/{id}")
async def get_job(request: Request, id: str) -> ExtractionJob:
    """How far a vector in the making is."""
    serving = serving_of(request)
    return await _job(serving, serving.extractions.get(id))


@router.delete("/jobs/{id}")
async def cancel_job(request: Request, id: str) -> ExtractionJob:
    """Stop making a vector; nothing is kept of it."""
    serving = serving_of(request)
    return await _job(serving, serving.extractions.cancel(id))


async def _job(serving: Serving, job: Extraction) -> ExtractionJob:
    vector = None
    if job.state == "done" and job.name in serving.vectors.names():
        vector = Vector(**await serving.apart(lambda: serving.vectors.facts(job.name)))
    shown = {name: getattr(job, name) for name in ExtractionJob.model_fields if name != "vector"}
    return ExtractionJob(**shown, vector=vector)


# --- running answers -------------------------------------------------------------------------


class Slider(Body):
    """The steering from now on: the whole line, not a change to it. Empty, or `off`: none."""

    steer: Annotated[str, Field(max_length=2000)]


class RunningGeneration(BaseModel):
    """An answer being written. tokens: how many it has; steer: the steering of the next."""

    id: str
    state: Literal["queued", "prefill", "running", "done"]
    prompt_tokens: int
    cached_tokens: int
    prefilled: int
    tokens: int
    steer: str


class Steered(RunningGeneration):
    """first_token: the index (from 0) of the first token that obeys. warnings: what to know."""

    first_token: int
    warnings: list[str]


@router.get("/generations")
async def list_generations(request: Request) -> list[RunningGeneration]:
    """The answers in line, being written, or done lately."""
    return [_shown(found) for found in serving_of(request).recent()]


@router.get("/generations/{id}")
async def get_generation(request: Request, id: str) -> RunningGeneration:
    """One answer: how far it is, and its steering."""
    return _shown(_found(serving_of(request), id))


@router.patch("/generations/{id}")
async def steer_generation(request: Request, id: str, body: Slider) -> Steered:
    """Change the steering of an answer while it is being written; its next token obeys."""
    serving = serving_of(request)
    generation = _found(serving, id)
    steering = await serving.steering_of(body.steer)
    try:
        first = generation.steer(steering.plan)
    except MlxsteerError as error:
        raise ApiError(409, str(error), code="generation_done", param="id") from None
    shown = _shown(generation).model_dump()
    return Steered(**shown, first_token=first, warnings=list(steering.plan.warnings))


@router.delete("/generations/{id}")
async def cancel_generation(request: Request, id: str) -> RunningGeneration:
    """Stop an answer. Its stream ends with an error of code `cancelled`."""
    generation = _found(serving_of(request), id)
    generation.cancel()
    return _shown(generation)


def _found(serving: Serving, id: str) -> Generation:
    """By its id, or by that of the response that it belongs to (chatcmpl-…, msg_…)."""
    generation = serving.engine.generation(id.replace("_", "-").rpartition("-")[2])
    if generation is None:
        message = f"No answer {id[:80]!r} is being written here, or was lately."
        raise ApiError(404, message, code="unknown_generation", param="id")
    return generation


def _shown(generation: Generation) -> RunningGeneration:
    return RunningGeneration(
        id=generation.id,
        state=generation.state,
        prompt_tokens=generation.prompt_tokens,
        cached_tokens=generation.cached_tokens,
        prefilled=generation.prefilled,
        tokens=generation.tokens,
        steer=str(generation.plan),
    )
