"""A judge is blind, fair to both orders, and clear about what it could not read or reach."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxsteer
from mlxsteer import judgebackends
from mlxsteer.errors import MlxsteerError, ModelError, UsageError
from mlxsteer.judge import Comparison, win_rate
from mlxsteer.judgebackends import EndpointJudge, LocalJudge, open_judge
from mlxsteer.model import Model
from tests.chat_models import WORDS, chat_folder, write_tokenizer

QUESTIONS = [f"Question {i}?" for i in range(12)]
SHORT = ["Yes."] * 12
LONG = ["Yes, and for many reasons."] * 12
TRAIT = "Few words."


class Reader:
    """Prefers the shorter answer, or what `reply` says; keeps what it was shown."""

    def __init__(self, reply: Callable[[Comparison], float] | None = None) -> None:
        self.shown: list[Comparison] = []
        self.reply = reply or (lambda one: float(np.sign(len(one.second) - len(one.first))))

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        self.shown += comparisons
        return [self.reply(one) for one in comparisons]


# ---- who wins -------------------------------------------------------------------------------


@pytest.mark.parametrize("both_orders", [True, False])
def test_the_arm_that_shows_more_wins_in_any_order(both_orders: bool) -> None:
    found = win_rate(Reader(), QUESTIONS, SHORT, LONG, TRAIT, both_orders=both_orders)
    assert found.win_rate == 1.0
    assert found.preferences == (1.0,) * 12
    assert win_rate(Reader(), QUESTIONS, LONG, SHORT, TRAIT, seed=3).win_rate == 0.0


def test_a_judge_that_takes_the_first_finds_a_tie_and_its_bias_is_told() -> None:
    found = win_rate(Reader(lambda _: 0.8), QUESTIONS, SHORT, LONG, TRAIT)
    assert found.win_rate == 0.5
    assert found.preferences == (0.0,) * 12
    assert found.position_bias == pytest.approx(0.8)


def test_each_pair_is_asked_in_both_orders_or_in_one_that_the_seed_draws() -> None:
    both = Reader()
    win_rate(both, QUESTIONS, SHORT, LONG, TRAIT)
    assert len(both.shown) == 24
    assert sum(one.first == "Yes." for one in both.shown) == 12
    drawn = []
    for seed in (0, 0, 1):
        once = Reader()
        win_rate(once, QUESTIONS, SHORT, LONG, TRAIT, seed=seed, both_orders=False)
        assert len(once.shown) == 12
        drawn.append([(one.question, one.first) for one in once.shown])
    assert drawn[0] == drawn[1] != drawn[2]
    assert {first for _, first in drawn[0]} == {"Yes.", LONG[0]}


def test_equal_answers_are_a_tie_that_nobody_is_asked_about() -> None:
    judge = Reader()
    found = win_rate(judge, QUESTIONS[:2], ["Yes.", "Same."], ["Yes, indeed.", "Same."], TRAIT)
    assert found.preferences == (1.0, 0.0)
    assert found.win_rate == 0.75
    assert {one.question for one in judge.shown} == {QUESTIONS[0]}
    assert win_rate(judge, ["Why?"], ["x"], ["x"], TRAIT).win_rate == 0.5


def test_unreadable_replies_are_counted_and_left_out() -> None:
    def reply(one: Comparison) -> float:
        return math.nan if one.question == QUESTIONS[0] else 1.0 if one.first == "Yes." else -1.0

    found = win_rate(Reader(reply), QUESTIONS, SHORT, LONG, TRAIT)
    assert found.unread == 2
    assert math.isnan(found.preferences[0])
    assert found.win_rate == 1.0
    with pytest.raises(MlxsteerError, match="name neither answer"):
        win_rate(Reader(lambda _: math.nan), QUESTIONS, SHORT, LONG, TRAIT)


def test_every_question_needs_its_two_answers() -> None:
    with pytest.raises(UsageError, match="12 questions, 12 and 3 answers"):
        win_rate(Reader(), QUESTIONS, SHORT, LONG[:3], TRAIT)


# ---- the local model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model whose tokenizer knows A and B."""
    folder = chat_folder(tmp_path_factory.mktemp("judge") / "tiny")
    choices = ["A", "B"]
    write_tokenizer(folder, [*WORDS[: -len(choices)], *choices])
    return mlxsteer.load(str(folder))


def chances(model: Model, prompt: str, choices: Sequence[str]) -> np.ndarray:
    """Probabilities of the choices alone, from one prompt at a time."""
    logits = np.array(model.logits(model.render(prompt)))[-1]
    ids = [model.tokenizer.encode(choice)[0] for choice in choices]
    weights = np.exp(logits[ids] - logits[ids].max())
    return weights / weights.sum()


@pytest.mark.parametrize("elements", [1, 1 << 27])
def test_the_local_judge_reads_the_log_probabilities_of_its_choices(
    reader: Model, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judgebackends, "MAX_ELEMENTS", elements)
    judge = LocalJudge(reader)
    shown = [Comparison("w1 w2", "w3", "w4 w5 w6", "w7"), Comparison("w8", "w9 w1", "w2", "w7")]
    for found, one in zip(judge.compare(shown), shown, strict=True):
        a, b = chances(reader, f"{one.prompt} Reply with one letter, A or B.", "AB")
        assert found == pytest.approx(a - b, abs=1e-5)


def test_a_model_without_tokens_for_the_choices_cannot_judge(tiny: Model) -> None:
    with pytest.raises(ModelError, match=r"no token for 'A'.*--judge URL"):
        LocalJudge(tiny).compare([Comparison("w1", "w2", "w3", "w4")])


def test_the_local_judge_leaves_no_steering_behind(reader: Model) -> None:
    before = reader.logits([7, 8, 9])
    LocalJudge(reader).compare([Comparison("w1", "w2", "w3", "w4")])
    assert mx.array_equal(before, reader.logits([7, 8, 9]))


# ---- an endpoint ----------------------------------------------------------------------------


class StandIn:
    """A chat completions server that answers from a list, (status, body) or a text each."""

    def __init__(self, replies: list[Any]) -> None:
        self.replies = replies
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.requests.append((self.path, dict(self.headers), body))
                reply = stand_in.replies.pop(0)
                if isinstance(reply, str):
                    reply = (200, {"choices": [{"message": {"content": reply}}]})
                status, content = reply
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def serve() -> Iterator[Callable[..., StandIn]]:
    running = []

    def start(*replies: Any) -> StandIn:
        running.append(StandIn(list(replies)))
        return running[-1]

    yield start
    for stand_in in running:
        stand_in.server.shutdown()
        stand_in.server.server_close()


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in judgebackends.KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


ONE = Comparison("Why?", "Because.", "It depends.", "Few words.")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("A", 1), ("b.", -1), ("**A**", 1), ("TIE", 0), ("It is a tie.", 0), ("Answer B", -1)],
)
def test_the_endpoint_is_asked_for_one_word(
    serve: Callable[..., StandIn], reply: str, expected: float
) -> None:
    stand_in = serve(reply)
    assert EndpointJudge(stand_in.url, "wise").compare([ONE]) == [expected]
    [(path, _, body)] = stand_in.requests
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"]) == ("wise", 0)
    prompt = body["messages"][0]["content"]
    assert prompt.index("Because.") < prompt.index("It depends.") < prompt.index("Few words.")


@pytest.mark.parametrize("reply", ["", "neither of them", "A or B"])
def test_a_reply_that_names_no_answer_is_nan(serve: Callable[..., StandIn], reply: str) -> None:
    assert math.isnan(EndpointJudge(serve(reply).url, "wise").compare([ONE])[0])


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Answer B is a better example.", -1),  # the article is no vote
        ("<think>A or B? A ties with it.</think>\nB", -1),
        ("a", 1),
        ("It is a tie.", 0),
    ],
)
def test_articles_and_thoughts_are_no_votes(
    serve: Callable[..., StandIn], reply: str, expected: float
) -> None:
    assert EndpointJudge(serve(reply).url, "wise").compare([ONE]) == [expected]


@pytest.mark.parametrize("ending", ["/v1", "/v1/", "/v1/chat/completions"])
def test_addresses_may_name_the_path(serve: Callable[..., StandIn], ending: str) -> None:
    stand_in = serve("A")
    EndpointJudge(stand_in.url + ending, "wise").compare([ONE])
    assert stand_in.requests[0][0] == "/v1/chat/completions"


def test_the_key_comes_from_the_environment(
    serve: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = serve("A", "A", "A")
    judge = EndpointJudge(stand_in.url, "wise")
    judge.compare([ONE])
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    judge.compare([ONE])
    monkeypatch.setenv("MLXSTEER_JUDGE_KEY", "first")
    judge.compare([ONE])
    sent = [headers.get("Authorization") for _, headers, _ in stand_in.requests]
    assert sent == [None, "Bearer second", "Bearer first"]


def test_a_busy_server_is_asked_again(serve: Callable[..., StandIn]) -> None:
    stand_in = serve((429, {}), (503, {}), "A")
    assert EndpointJudge(stand_in.url, "wise", wait=0.01).compare([ONE]) == [1]
    assert len(stand_in.requests) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {}), "refused: 401.*MLXSTEER_JUDGE_KEY"),
        ((404, {}), "404.*serves 'wise'"),
        ((400, {}), "400.*takes chat messages"),
        ((200, {"error": "no"}), "not answer as a chat completions"),
        ((200, []), "not answer as a chat completions"),
    ],
)
def test_faults_are_one_sentence_and_are_not_repeated(
    serve: Callable[..., StandIn], reply: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXSTEER_JUDGE_KEY", "secret-key")
    stand_in = serve(reply)
    with pytest.raises(MlxsteerError, match=message) as caught:
        EndpointJudge(stand_in.url, "wise", wait=0.01).compare([ONE])
    assert "\n" not in str(caught.value)
    assert "secret-key" not in str(caught.value)
    assert len(stand_in.requests) == 1


def test_a_server_that_is_down_or_slow_is_given_up(serve: Callable[..., StandIn]) -> None:
    stand_in = serve(*[(503, {})] * 3)
    with pytest.raises(MlxsteerError, match=r"failed 3 times: 503.*try again"):
        EndpointJudge(stand_in.url, "wise", retries=2, wait=0.01).compare([ONE])
    with pytest.raises(MlxsteerError, match="failed 1 times"):
        EndpointJudge("http://127.0.0.1:1", "wise", retries=0).compare([ONE])


def test_judges_are_opened_by_name(reader: Model) -> None:
    assert isinstance(open_judge("local", None, reader), LocalJudge)
    assert open_judge("http://here/v1", "m", reader) == EndpointJudge("http://here/v1", "m")
    with pytest.raises(UsageError, match="--judge-model NAME"):
        open_judge("http://here/v1", None, reader)
    with pytest.raises(UsageError, match="no address of a judge"):
        open_judge("locl", None, reader)


def test_a_whole_comparison_through_an_endpoint(serve: Callable[..., StandIn]) -> None:
    stand_in = serve(*["A"] * 4)
    found = win_rate(EndpointJudge(stand_in.url, "m"), QUESTIONS[:2], SHORT[:2], LONG[:2], TRAIT)
    assert found.position_bias == 1.0
    assert found.win_rate == 0.5
