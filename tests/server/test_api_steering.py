"""The steering routes: sliders of a running answer, vectors listed and made, meters, status."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import mlxsteer
from mlxsteer import library
from mlxsteer.model import Model
from mlxsteer.server.engine import Engine
from mlxsteer.server.extractions import MAX_WAITING
from mlxsteer.server.jobs import Event
from mlxsteer.server.settings import Settings
from mlxsteer.vector import Calibration
from tests.chat_models import chat_folder, random_directions
from tests.server.api import LIMIT, WEB, ScriptedEngine, chat, post, running

CHAT = "/v1/chat/completions"
# Neither the end of the answer nor a marker of thoughts.
WORDS_ONLY = {str(token): -100 for token in range(6)}
OWN = {"name": "mine", "positive": "w1 w2", "negative": "w3 w4", "calibrate": False, "pairs": 8}


def chunks_of(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a stream up to its [DONE]."""
    for line in reply.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@pytest.fixture
def slow_address(chatty: Model) -> Iterator[tuple[str, threading.Event]]:
    """(the address of a server that takes 0.1 s a token, what ends that)."""
    engine = Engine(chatty)
    engine.start()
    hurry = threading.Event()

    def drag() -> Iterator[None]:
        while not hurry.wait(0.1):
            yield

    engine.run_between(drag)
    with running(engine, chatty) as address:
        yield address, hurry
        hurry.set()


def test_a_slider_moved_mid_answer_changes_the_rest(
    slow_address: tuple[str, threading.Event], push: Path
) -> None:
    address, hurry = slow_address
    body = chat("tiny", stream=True, max_tokens=120, logit_bias=WORDS_ONLY)
    pieces: list[tuple[str, str]] = []
    first = None
    with WEB.stream("POST", address + CHAT, json=body) as reply:
        id = reply.headers["x-mlxsteer-generation"]
        for chunk in chunks_of(reply):
            choice = chunk["choices"][0]
            if choice["delta"].get("content"):
                pieces.append((choice["delta"]["content"], choice["steer"]))
            if len(pieces) == 3 and first is None:
                moved = WEB.patch(
                    f"{address}/v1/steering/generations/{id}", json={"steer": "push:4r"}
                )
                assert moved.status_code == 200
                first = moved.json()["first_token"]
                hurry.set()
    assert first is not None
    assert 3 <= first < 120
    assert [steer for _, steer in pieces] == [""] * first + ["push:4r"] * (120 - first)
    plain = post(address, CHAT, body | {"stream": False}).json()
    kept, rest = "".join(t for t, _ in pieces[:first]), "".join(t for t, _ in pieces[first:])
    unsteered = plain["choices"][0]["message"]["content"]
    assert unsteered.startswith(kept)
    assert unsteered != kept + rest


def test_the_first_steering_may_come_while_another_answer_is_written(
    tmp_path: Path, push: Path
) -> None:
    # A model whose sites nobody has looked for yet: finding them runs the model.
    fresh = mlxsteer.load(str(chat_folder(tmp_path / "tiny")))
    engine = Engine(fresh)
    engine.start()
    body = chat("tiny", stream=True, max_tokens=150, logit_bias=WORDS_ONLY)
    with (
        running(engine, fresh) as address,
        WEB.stream("POST", address + CHAT, json=body) as reply,
    ):
        chunks = chunks_of(reply)
        next(chunks)
        for index in range(4):
            steered = post(address, CHAT, chat("tiny", steer=f"push:{index}r"))
            assert steered.status_code == 200, steered.text
        assert list(chunks)[-1]["choices"][0]["finish_reason"] == "length"


def test_a_slider_of_a_finished_answer_is_409_and_of_none_404(address: str, push: Path) -> None:
    reply = post(address, CHAT, chat("tiny"))
    id = reply.headers["x-mlxsteer-generation"]
    for name in (id, reply.json()["id"]):
        done = WEB.patch(f"{address}/v1/steering/generations/{name}", json={"steer": "push:1r"})
        assert (done.status_code, done.json()["error"]["code"]) == (409, "generation_done")
    gone = WEB.patch(f"{address}/v1/steering/generations/zz", json={"steer": ""})
    assert gone.status_code == 404
    wrong = WEB.patch(f"{address}/v1/steering/generations/{id}", json={"steer": "nobody:1"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "unknown_vector")


def test_running_answers_are_listed_and_can_be_stopped(chatty: Model) -> None:
    engine = ScriptedEngine(chatty, ["w1"], Event("", finish_reason="cancelled"))
    engine.release.clear()
    with running(engine, chatty) as address:
        replies: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: replies.append(post(address, CHAT, chat("tiny"))))
        asking.start()
        while not engine.generations:
            time.sleep(0.01)
        shown = WEB.get(f"{address}/v1/steering/generations").json()
        assert [answer["state"] for answer in shown] == ["queued"]
        WEB.delete(f"{address}/v1/steering/generations/{shown[0]['id']}")
        assert engine.generations[0].cancelled
        engine.release.set()
        asking.join(LIMIT)
    assert replies[0].status_code == 503
    assert replies[0].json()["error"]["code"] == "cancelled"


def test_meters_give_one_reading_a_token(address: str, push: Path) -> None:
    body = chat("tiny", meter=["push"], logit_bias=WORDS_ONLY)
    whole = post(address, CHAT, body).json()["choices"][0]["readings"]
    assert [set(reading) for reading in whole] == [{"push"}] * 4
    with WEB.stream("POST", address + CHAT, json=body | {"stream": True}) as reply:
        found = [c["choices"][0].get("readings", []) for c in chunks_of(reply)]
    assert [reading for each in found for reading in each] == whole


def test_steering_moves_its_own_meter(address: str, push: Path) -> None:
    def mean(steer: str) -> float:
        body = chat("tiny", meter=["push"], steer=steer, logit_bias=WORDS_ONLY)
        readings = post(address, CHAT, body).json()["choices"][0]["readings"]
        return float(sum(reading["push"] for reading in readings) / len(readings))

    assert mean("push:-2r") < mean("") < mean("push:2r")


def test_vectors_are_listed_with_their_range(address: str, chatty: Model, push: Path) -> None:
    (library.user_dir(chatty.key) / "broken.safetensors").write_bytes(b"no")
    listed = WEB.get(f"{address}/v1/steering/vectors").json()
    assert [vector["name"] for vector in listed["vectors"]] == ["push"]
    vector = listed["vectors"][0]
    assert (vector["layers"], vector["op"], vector["calibrated"]) == ([1, 2], "add", False)
    assert (vector["safe_min"], vector["safe_max"]) == (None, None)
    assert vector["source"] == "user"
    assert listed["unreadable"][0]["name"] == "broken"
    assert "terse" in listed["sets"]
    assert WEB.get(f"{address}/v1/steering/vectors/push").json() == vector
    assert WEB.get(f"{address}/v1/steering/vectors/nobody").status_code == 404


def test_a_calibrated_vector_is_safe_to_its_edge(address: str, chatty: Model) -> None:
    known = replace(random_directions(), calibration=Calibration(0.5, 0.4))
    library.save(known, chatty.key, "known")
    vector = WEB.get(f"{address}/v1/steering/vectors/known").json()
    assert (vector["safe_min"], vector["safe_max"]) == (-5, 5)
    assert (vector["delta_plus"], vector["delta_minus"]) == (0.5, 0.4)
    assert "coherent up to dose 0.5" in vector["verdict"]


def test_warnings_come_with_the_response(address: str, push: Path) -> None:
    reply = post(address, CHAT, chat("tiny", steer="push:6"))
    assert "above 5" in reply.headers["x-mlxsteer-warnings"]
    assert "uncalibrated" in reply.headers["x-mlxsteer-warnings"]


def _finished(address: str, id: str) -> dict[str, Any]:
    deadline = time.monotonic() + LIMIT
    while True:
        job: dict[str, Any] = WEB.get(f"{address}/v1/steering/jobs/{id}").json()
        if job["state"] not in ("queued", "running"):
            return job
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_vector_is_made_in_the_background_and_then_steers(address: str, chatty: Model) -> None:
    started = post(address, "/v1/steering/vectors", OWN)
    assert started.status_code == 202
    job = _finished(address, started.json()["id"])
    assert (job["state"], job["error"]) == ("done", None)
    assert (job["done"], job["total"]) == (8, 8) or job["done"] == job["total"] > 0
    assert job["vector"]["name"] == "mine"
    assert "Uncalibrated" in job["vector"]["verdict"]
    assert library.find("mine", chatty.key).about["description"] == "w1 w2 / w3 w4"
    reply = post(address, CHAT, chat("tiny", steer="mine:2"))
    assert reply.headers["x-mlxsteer-steer"] == "mine:2"
    again = post(address, "/v1/steering/vectors", OWN)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "exists")


def test_an_extraction_that_fails_says_why(address: str) -> None:
    same = OWN | {"name": "same", "positive": "unknown words", "negative": "other words"}
    job = _finished(address, post(address, "/v1/steering/vectors", same).json()["id"])
    assert job["state"] == "failed"
    assert "do not differ" in job["error"] or job["error"]


BAD_VECTORS: dict[str, tuple[dict[str, Any], int]] = {
    "a path": ({"name": "../x"}, 400),
    "a file": ({"name": "x.safetensors", "positive": "a", "negative": "b"}, 400),
    "an unknown set": ({"name": "nobody"}, 404),
    "one pole": ({"name": "x", "positive": "a"}, 400),
    "equal poles": ({"name": "x", "positive": "a", "negative": " a "}, 400),
    "too many pairs": ({"name": "terse", "pairs": 10_000}, 400),
    "an unknown field": ({"name": "terse", "layers": [1]}, 400),
}


@pytest.mark.parametrize(("body", "status"), BAD_VECTORS.values(), ids=BAD_VECTORS.keys())
def test_a_vector_that_cannot_be_made_is_refused(
    address: str, body: dict[str, Any], status: int
) -> None:
    reply = post(address, "/v1/steering/vectors", body)
    assert reply.status_code == status, reply.text


def test_extractions_wait_in_a_bounded_line_and_can_be_cancelled(chatty: Model) -> None:
    with running(engine := Engine(chatty), chatty) as address:
        engine.start()
        gate = threading.Event()
        engine.run_between(lambda: gate.wait(LIMIT))
        ids = [
            post(address, "/v1/steering/vectors", OWN | {"name": f"v{index}"}).json()["id"]
            for index in range(MAX_WAITING)
        ]
        twice = post(address, "/v1/steering/vectors", OWN | {"name": "v1"})
        assert twice.status_code == 409
        full = post(address, "/v1/steering/vectors", OWN | {"name": "more"})
        assert full.status_code == 429
        assert full.headers["retry-after"]
        for id in ids:
            WEB.delete(f"{address}/v1/steering/jobs/{id}")
        gate.set()
        assert {_finished(address, id)["state"] for id in ids} == {"cancelled"}
    assert not library.user_dir(chatty.key).exists()


def test_a_full_queue_is_429_and_a_closing_engine_503(chatty: Model) -> None:
    engine = Engine(chatty, max_running=1, max_queued=0)
    with running(engine, chatty) as address:
        engine.start()
        gate = threading.Event()
        engine.run_between(lambda: gate.wait(LIMIT))
        body = chat("tiny", stream=True)
        with WEB.stream("POST", address + CHAT, json=body) as first:
            assert first.status_code == 200
            full = post(address, CHAT, chat("tiny"))
            assert full.status_code == 429
            assert int(full.headers["retry-after"]) >= 1
            assert full.json()["error"]["type"] == "rate_limit_error"
            claude = post(address, "/v1/messages", chat("tiny"))
            assert claude.json()["error"]["type"] == "rate_limit_error"
            gate.set()
            first.read()
        engine.close()
        closed = post(address, CHAT, chat("tiny"))
        assert (closed.status_code, closed.headers["retry-after"]) == (503, "10")


def test_an_error_in_a_stream_is_its_last_chunk(chatty: Model) -> None:
    end = Event("", finish_reason="error", error="The cat unplugged it.")
    with running(ScriptedEngine(chatty, ["w1 "], end), chatty) as address:
        for path, body in (
            (CHAT, chat("tiny")),
            ("/v1/messages", chat("tiny")),
            ("/v1/completions", {"model": "tiny", "prompt": "w1"}),
            ("/v1/responses", {"model": "tiny", "input": "w1"}),
        ):
            text = post(address, path, body | {"stream": True}).text
            assert "w1" in text
            assert "The cat unplugged it." in text
            whole = post(address, path, body)
            assert (whole.status_code, "cat" in whole.text) == (500, True)


def test_a_silent_stream_says_that_it_lives(chatty: Model) -> None:
    engine = ScriptedEngine(chatty, ["w1"])
    engine.release.clear()
    with (
        running(engine, chatty, Settings(keep_alive=0.1)) as address,
        WEB.stream("POST", address + CHAT, json=chat("tiny", stream=True)) as reply,
    ):
        lines = (line for line in reply.iter_lines() if line)
        # Where the machine is slow, signs of life come before the first frame too.
        first = next(line for line in lines if line != ": keep-alive")
        assert first.startswith("data: ")  # whose answer it is
        assert [next(lines), next(lines)] == [": keep-alive"] * 2
        engine.release.set()
        assert list(lines)[-1] == "data: [DONE]"


def test_status_metrics_and_health_tell_of_the_model(address: str) -> None:
    post(address, CHAT, chat("tiny"))
    status = WEB.get(f"{address}/v1/steering/status").json()
    assert (status["model"], status["n_layers"], status["queued"]) == ("tiny", 4, 0)
    metrics = WEB.get(f"{address}/metrics").text
    assert f'mlxsteer_requests_total{{route="{CHAT}",status="200"}}' in metrics
    assert "mlxsteer_answer_tokens_total" in metrics
    assert WEB.get(f"{address}/health").json() == {"status": "ok", "model": "tiny"}


def test_log_lines_hold_no_text_of_the_prompt(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "mlxsteer.server"):
        post(address, CHAT, chat("tiny", messages=[{"role": "user", "content": "w61 hush"}]))
        deadline = time.monotonic() + LIMIT  # the line comes after the response
        lines: list[Any] = []
        while not any(line and line.get("route") == CHAT for line in lines):
            assert time.monotonic() < deadline
            lines = [vars(record).get("fields") for record in caplog.records]
    line = next(line for line in lines if line and line.get("route") == CHAT)
    assert line["answer_tokens"] == 4
    assert "hush" not in json.dumps(lines)


def test_a_removed_vector_is_unknown_at_once(address: str, push: Path) -> None:
    assert post(address, CHAT, chat("tiny", steer="push:1r")).status_code == 200
    push.unlink()
    assert post(address, CHAT, chat("tiny", steer="push:1r")).status_code == 400
