"""Who judges: the local model, by the log-probabilities of its choice, or a chat endpoint.

The local judge runs unsteered, and generates only where it is asked for words. The endpoint is
any that speaks the OpenAI chat completions protocol; its key is read from the environment.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import mlx.core as mx
import numpy as np

from mlxsteer.errors import MlxsteerError, ModelError, UsageError
from mlxsteer.generation import Sampling, generate_batch
from mlxsteer.judge import Comparison, Judge
from mlxsteer.plan import Plan

if TYPE_CHECKING:
    from mlxsteer.model import Model

KEY_VARIABLES = ("MLXSTEER_JUDGE_KEY", "OPENAI_API_KEY")
MAX_ELEMENTS = 1 << 27  # float32 logits held at a time: 512 MiB
LOCAL_REPLY_TOKENS = 24
MAX_REPLY_TOKENS = 1024  # a model that reasons first needs them; others stop after a word
AT_A_TIME = 4  # requests to an endpoint
TRANSIENT = (408, 409, 429, 500, 502, 503, 504)


def open_judge(where: str, name: str | None, model: Model) -> Judge:
    """`local` is `model` itself; a URL is an endpoint, whose model is `name`."""
    if where == "local":
        if name:
            raise UsageError("A local judge is the model itself. Leave out --judge-model.")
        return LocalJudge(model)
    judge = EndpointJudge(where, name or "")
    if not name:
        raise UsageError("An endpoint serves several models. Say which: --judge-model NAME.")
    return judge


class LocalJudge:
    """The model judges by how likely it finds each choice as its first token."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        """p(A) - p(B) of each, between these two."""
        prompts = [f"{one.prompt} Reply with one letter, A or B." for one in comparisons]
        chances = self._chances(prompts, ("A", "B"))
        return [float(a - b) for a, b in chances]

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """The beginning of the model's greedy reply to each prompt."""
        rows = [self.model.render(prompt) for prompt in prompts]
        sampling = Sampling(max_tokens=LOCAL_REPLY_TOKENS)
        found = generate_batch(self.model, rows, [Plan([])] * len(rows), sampling)
        return [answer.text for answer in found]

    def _chances(self, prompts: Sequence[str], choices: Sequence[str]) -> np.ndarray:
        """float [prompts, choices]: probabilities of the choices alone, summing to 1."""
        tokens = mx.array([self._token(choice) for choice in choices])
        rows = [self.model.render(prompt) for prompt in prompts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        chances = np.zeros((len(rows), len(choices)))
        while order:
            batch = [order.pop()]
            fit = MAX_ELEMENTS // (len(rows[batch[0]]) * self.model.vocabulary)
            while order and len(batch) < fit:
                batch.append(order.pop())
            longest = len(rows[batch[0]])
            padded = mx.array([rows[i] + [0] * (longest - len(rows[i])) for i in batch])
            last = mx.array([len(rows[i]) - 1 for i in batch])
            logits = self.model.network(padded)[mx.arange(len(batch)), last].astype(mx.float32)
            chances[batch] = np.array(mx.softmax(logits[:, tokens], axis=-1))
        return chances

    def _token(self, choice: str) -> int:
        tokens = list(self.model.tokenizer.encode(choice, add_special_tokens=False))
        if len(tokens) != 1 or tokens == self._unknown():
            raise ModelError(
                f"{self.model.label} has no token for {choice!r}, so it cannot judge. Use an"
                " endpoint: --judge URL --judge-model NAME."
            )
        return int(tokens[0])

    def _unknown(self) -> list[int]:
        """What the tokenizer makes of a letter that it cannot know."""
        return list(self.model.tokenizer.encode("\ue000", add_special_tokens=False))


@dataclass(frozen=True)
class EndpointJudge:
    """A model behind `url`, asked for one word at temperature 0.

    timeout: seconds for one request. retries: further tries after a busy or silent server,
    waiting `wait`, 2·`wait`, 4·`wait` … seconds between them.
    """

    url: str
    name: str
    timeout: float = 60.0
    retries: int = 3
    wait: float = 1.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UsageError(
                f"{self.url!r} is no address of a judge. Use --judge local, or a URL such as"
                " http://localhost:8000/v1."
            )

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        """1, 0 or -1 of each."""
        order = "Reply with one word and nothing else: A, B, or TIE."
        replies = self.ask([f"{one.prompt} {order}" for one in comparisons])
        return [_choice(reply) for reply in replies]

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """The reply to each prompt. Raises MlxsteerError."""
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            return list(pool.map(self._ask, prompts))

    def _ask(self, prompt: str) -> str:
        """The reply's text. Raises MlxsteerError."""
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": MAX_REPLY_TOKENS,
        }
        raw = self._sent(json.dumps(body).encode())
        try:
            return str(json.loads(raw)["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError):
            raise MlxsteerError(
                f"The judge at {self.url} does not answer as a chat completions endpoint does."
                " Check the address; it usually ends in /v1."
            ) from None

    def _sent(self, body: bytes) -> bytes:
        request = urllib.request.Request(self._address, body, self._headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                fault = f"{error.code} {error.reason}"
                if error.code not in TRANSIENT:
                    raise MlxsteerError(self._refused(error.code, fault)) from None
            except OSError as error:  # no connection, or none in time
                fault = str(getattr(error, "reason", error))
            if attempt < self.retries:
                time.sleep(self.wait * 2**attempt)
        raise MlxsteerError(
            f"The judge at {self.url} failed {self.retries + 1} times: {fault}."
            " Is it running? What was generated is kept; try again."
        )

    @property
    def _address(self) -> str:
        base = self.url.rstrip("/")
        if base.endswith("/chat/completions"):
            return base
        return f"{base}{'' if urlsplit(base).path else '/v1'}/chat/completions"

    @property
    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        return {**headers, "Authorization": f"Bearer {key}"} if key else headers

    def _refused(self, code: int, fault: str) -> str:
        advice = {
            401: f"Set its key in {KEY_VARIABLES[0]}.",
            403: f"Check the key in {KEY_VARIABLES[0]}.",
            404: f"Check the address, and whether it serves {self.name!r}.",
        }
        return f"The judge at {self.url} refused: {fault}. " + advice.get(
            code, f"Check whether {self.name!r} takes chat messages."
        )


def _choice(reply: str) -> float:
    """1 for A, -1 for B, 0 for a tie, else nan. A small a within a sentence is an article."""
    said = _conclusion(reply)
    alone = said.strip(" .*\"'()").upper()
    found = [alone] if alone in ("A", "B") else re.findall(r"\b(A|B)\b", said)
    if re.search(r"\btie\b", said, re.IGNORECASE):
        return 0.0
    return {"A": 1.0, "B": -1.0}[found[0]] if len(set(found)) == 1 else math.nan


def _conclusion(reply: str) -> str:
    """What follows the thoughts, where a model writes them into its reply."""
    return reply.rpartition("</think>")[2]
