"""Two processes in a ring on loopback give the logits of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxsteer.errors import ModelError
from mlxsteer.models.deepseek_v4.sharding import shard
from tests.v4.tiny import EXACT, config, golden, largest, loaded, model, weights


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def ring(folder: Path) -> list:
    """What each of two processes wrote."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    env = os.environ | {"MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.v4.ring_worker", str(folder / "out")]
    root = Path(__file__).parents[2]
    workers = [
        subprocess.Popen(
            command, env=env | {"MLX_RANK": str(r)}, cwd=root, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    try:
        for worker in workers:
            _, err = worker.communicate(timeout=60)
            assert worker.returncode == 0, err
    finally:
        for worker in workers:
            worker.kill()
    return [np.load(folder / f"out.{r}.npz") for r in range(2)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    if not mx.distributed.is_available("ring"):
        pytest.skip("no ring backend")
    return ring(tmp_path_factory.mktemp("ring"))


@pytest.mark.parametrize("kind", ["heads", "layers"])
def test_a_ring_of_two_processes_equals_one(kind, parts):
    z = golden("tiny_fp32")
    whole = sum(p.nbytes for _, p in tree_flatten(model().parameters()))
    for part in parts:
        assert largest(part[f"{kind}_logits"], z["logits"][:130]) < EXACT
        assert largest(part[f"{kind}_steered"], z["logits_steered"][:130]) < EXACT
        assert part[f"{kind}_nbytes"] < 0.8 * whole


class Processes:
    def __init__(self, n: int):
        self.n = n

    def size(self) -> int:
        return self.n

    def rank(self) -> int:
        return 0


def test_processes_that_do_not_divide_the_groups_are_refused():
    with pytest.raises(ModelError, match="2 output groups cannot be divided among 3"):
        shard(model(), Processes(3))


def test_one_process_changes_nothing():
    built = loaded(config("tiny_fp32"), weights())
    before = {k: p.shape for k, p in tree_flatten(built.parameters())}
    shard(built, Processes(1))
    assert {k: p.shape for k, p in tree_flatten(built.parameters())} == before
