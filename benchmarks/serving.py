"""Many clients at once against one after the other, on the engine of `mlxsteer serve`.

Every client asks its own question under its own steering. Both ways decode the same tokens, in
the same run, so the ratio of the two rates is what sharing steps gives on this machine.

    python benchmarks/serving.py --clients 32 --tokens 64
"""

from __future__ import annotations

import argparse
import threading
import time
from dataclasses import dataclass, replace

import mlxsteer
from mlxsteer.generation import Sampling, stream
from mlxsteer.model import Model
from mlxsteer.server.engine import Engine, Job

STEERS = (None, "terse:3", "formal:3", "cheerful:2", "cheerful:3", "terse:2, formal:-1")
TOPICS = ("tides", "rust", "compilers", "bees", "glass", "maps", "salt", "violins")


@dataclass(frozen=True)
class Result:
    """One way of serving: the answers' tokens, seconds from the first request to the last token
    (on the clock, and of processor time), and seconds until a client saw its first token, in the
    middle and at worst."""

    answers: list[list[int]]
    seconds: float
    processor: float
    first_median: float
    first_worst: float

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))


def jobs_of(model: Model, clients: int, tokens: int) -> list[Job]:
    """What the clients ask: greedy, of the same length, each under its own steering."""
    jobs = []
    for number in range(clients):
        question = f"Tell me {number + 2} things about {TOPICS[number % len(TOPICS)]}."
        plan = model.plan(STEERS[number % len(STEERS)])
        jobs.append(Job(tuple(model.render(question)), plan, Sampling(max_tokens=tokens)))
    return jobs


def served(model: Model, jobs: list[Job], at_once: int) -> Result:
    """The jobs by `at_once` clients that ask again as soon as they are answered."""
    engine = Engine(model, max_running=at_once, max_queued=len(jobs))
    engine.start()
    answers: list[list[int]] = [[] for _ in jobs]
    waits = [0.0] * len(jobs)
    waiting = iter(list(enumerate(jobs)))  # shared by the clients
    started, used = time.perf_counter(), time.process_time()

    def client() -> None:
        for index, job in waiting:
            asked = time.perf_counter()
            for event in engine.submit(job).events():
                if not answers[index]:
                    waits[index] = time.perf_counter() - asked
                if event.token >= 0:
                    answers[index].append(event.token)

    clients = [threading.Thread(target=client) for _ in range(at_once)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    engine.close()
    waits.sort()
    return Result(answers, seconds, processor, waits[len(waits) // 2], waits[-1])


def single_runs(model: Model, jobs: list[Job]) -> list[list[int]]:
    """The answers by `generation.stream`, without an engine."""
    return [
        [
            piece.token
            for piece in stream(model, job.prompt, job.plan, job.sampling)
            if piece.finish_reason is None
        ]
        for job in jobs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    model = mlxsteer.load(options.model)
    jobs = jobs_of(model, options.clients, options.tokens)
    served(model, [replace(job, sampling=Sampling(max_tokens=4)) for job in jobs[:4]], 4)  # warm
    print(f"{model.label}, {options.clients} requests of up to {options.tokens} tokens\n")
    print("clients at once  seconds  tokens/s  CPU ms/token  first token, median / worst (s)")
    one, many = served(model, jobs, 1), served(model, jobs, options.clients)
    for count, result in ((1, one), (options.clients, many)):
        print(
            f"{count:15d} {result.seconds:8.1f} {result.tokens / result.seconds:9.1f}"
            f" {1000 * result.processor / result.tokens:13.1f}"
            f"  {result.first_median:.2f} / {result.first_worst:.2f}"
        )
    alone = single_runs(model, jobs)
    same = sum(a == b for a, b in zip(many.answers, alone, strict=True))
    clock = one.seconds / one.tokens * many.tokens / many.seconds
    processor = one.processor / one.tokens * many.tokens / many.processor
    print(f"\nratio of tokens/s: {clock:.2f}; of tokens per second of processor: {processor:.2f}")
    print(f"answers equal to their single runs: {same} of {len(jobs)}")


if __name__ == "__main__":
    main()
