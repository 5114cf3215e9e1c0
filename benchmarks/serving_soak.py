"""Minutes of clients of all manners on a real `mlxsteer serve`, and what grows in its process.

Beside the right answers there are clients that leave, read slowly, move sliders, or send what is
wrong (see `serving_clients`). The table shows what each got, and the server's memory, threads,
open files and sockets over the time. Exits with 1 when a status was wrong, a greedy answer was
not the one of its single run, or the server ended with more files or sockets than it began
with. Reads /proc, so it runs on Linux.

    python benchmarks/serving_soak.py --minutes 10
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlxsteer
from benchmarks.serving_clients import BUSY, KINDS, Asked, Client
from mlxsteer import library
from mlxsteer.model import Model
from mlxsteer.server.parts import Content, Reasoning, Splitter, format_of
from tests.chat_models import chat_folder, random_directions
from tests.server.process import served

KEY = "soak"
QUIET_SECONDS = 8.0  # beyond which nothing of the clients should be left (keep-alive: 5 s)
SAMPLE_SECONDS = 3.0


@dataclass(frozen=True)
class Sample:
    """The server's process at a moment. seconds: since the load began; memory in bytes."""

    seconds: float
    memory: int
    threads: int
    files: int
    sockets: int


def sample(pid: int, since: float) -> Sample:
    """What /proc says of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    facts = dict(line.split(":", 1) for line in status.splitlines())
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed while we read
            links.append(str(entry.readlink()))
    return Sample(
        time.monotonic() - since,
        int(facts["VmRSS"].split()[0]) * 1024,
        int(facts["Threads"]),
        len(links),
        sum(link.startswith("socket:") for link in links),
    )


# --- the load --------------------------------------------------------------------------------


def known_answers(
    model: Model, questions: list[str], steers: list[str], tokens: int
) -> list[Asked]:
    """Greedy answers without a server, thoughts first, as the API tells them apart."""
    known = []
    for question, steer in itertools.product(questions, steers):
        splitter = Splitter(format_of(model, model.render(question), None))
        text = model.generate(question, steer=steer or None, max_tokens=tokens)
        parts = [*splitter.feed(text), *splitter.finish()]
        thoughts = [part.text for part in parts if isinstance(part, Reasoning)]
        said = [part.text for part in parts if isinstance(part, Content)]
        known.append(Asked(question, steer, "".join([*thoughts, *said])))
    return known


class Load:
    """The clients, and what they got."""

    def __init__(
        self, known: list[Asked], words: list[str], model: str, options: argparse.Namespace
    ):
        self.options = options
        self.statuses: dict[str, Counter[int]] = {kind.name: Counter() for kind in KINDS}
        self.wrong: list[str] = []
        self.samples: list[Sample] = []
        self.equal = self.different = 0
        self._known, self._words, self._model = known, words, model

    async def run(self, address: str, pid: int) -> None:
        """Load for the wanted time, then silence, sampled all along."""
        httpx.get(f"{address}/health")  # from here on it has all that it opens for itself
        started = time.monotonic()
        end = started + 60 * self.options.minutes
        watching = asyncio.create_task(self._watch(pid, started))
        seeds = range(self.options.clients)
        await asyncio.gather(*(self._client(address, end, seed) for seed in seeds))
        await asyncio.sleep(QUIET_SECONDS)
        watching.cancel()
        self.samples.append(sample(pid, started))

    async def _watch(self, pid: int, started: float) -> None:
        while True:
            self.samples.append(sample(pid, started))
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _client(self, address: str, end: float, seed: int) -> None:
        rng = random.Random(seed)
        async with httpx.AsyncClient(
            base_url=address, headers={"x-api-key": KEY}, timeout=120, verify=False
        ) as web:
            tokens = self.options.tokens
            client = Client(web, self._model, KEY, rng, self._known, self._words, tokens)
            while time.monotonic() < end:
                kind = rng.choices(KINDS, [kind.weight for kind in KINDS])[0]
                try:
                    status = await kind.act(client)
                except httpx.HTTPError as error:
                    self.wrong.append(f"{kind.name}: {error!r}")
                    continue
                self.statuses[kind.name][status] += 1
                if status not in kind.wanted:
                    self.wrong.append(f"{kind.name}: {status}")
                if status == BUSY:
                    await asyncio.sleep(rng.random())
            self.equal += client.equal
            self.different += client.different


# --- the report ------------------------------------------------------------------------------


def show(load: Load) -> bool:
    """Print the tables; whether all is as it should be."""
    print(f"\n{'client':18s}  requests  statuses (0: it left)")
    for name, counts in load.statuses.items():
        found = ", ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
        print(f"{name:18s}  {counts.total():8d}  {found}")
    print(f"\ngreedy answers equal to their single runs: {load.equal} of "
          f"{load.equal + load.different}")  # fmt: skip
    for line, count in Counter(load.wrong).most_common(20):
        print(f"wrong: {line} ({count})")
    print("\n   minute  memory (MiB)  threads  open files  sockets")
    busy, quiet = load.samples[:-1], load.samples[-1]
    steps = [busy[round(at * (len(busy) - 1) / 10)] for at in range(11)]
    for each in [*steps, quiet]:
        print(
            f"{each.seconds / 60:9.1f} {each.memory / 2**20:13.1f} {each.threads:8d}"
            f" {each.files:11d} {each.sockets:8d}{'  (quiet)' if each is quiet else ''}"
        )
    left = quiet.sockets - busy[0].sockets, quiet.files - busy[0].files
    print(f"\nleft over when quiet: {left[0]} sockets, {left[1]} open files,"
          f" {quiet.threads - busy[0].threads} threads more than at the start")  # fmt: skip
    return not load.wrong and not load.different and max(left) <= 0


def tiny_model(folder: Path) -> str:
    """A random model of 64 words with two vectors of its own; its folder."""
    path = chat_folder(folder / "tiny")
    for seed, name in enumerate(("push", "pull")):
        library.save(random_directions(seed, name), library.model_key(str(path)))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: a tiny random one")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--log", type=Path, help="the server's log (default: a temporary file)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["MLXSTEER_HOME"] = str(folder / "home")
        steers = ["", "terse:3", "formal:-2", "terse:2, formal:1"]
        words = "tell me why the sea is blue and how bees find home in ten words".split()
        if options.model is None:
            steers = ["", "push:1r", "pull:-1r", "push:0.5r, pull:1r@all"]
            words = [f"w{number}" for number in range(50)]
        name = options.model or tiny_model(folder)
        model = mlxsteer.load(name)
        rng = random.Random(0)
        questions = [" ".join(rng.choices(words, k=4 + 6 * number)) for number in range(6)]
        known = known_answers(model, questions, steers, options.tokens)
        load = Load(known, words, model.label, options)
        limits = ["--max-running", "8", "--max-queued", "14", "--cache-size", "32M"]
        limits += ["--api-key", KEY]
        log = options.log or folder / "server.log"
        with served(name, log, limits) as (address, process):
            print(f"{model.label}, {options.clients} clients for {options.minutes:g} minutes")
            asyncio.run(load.run(address, process.pid))
        good = show(load)
        print(f"the server ended with status {process.returncode} after SIGTERM")
    sys.exit(0 if good and process.returncode == 0 else 1)


if __name__ == "__main__":
    main()
