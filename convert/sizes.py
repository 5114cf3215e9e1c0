"""Arithmetic of a plan: bytes, bytes read per token, and the Mac that holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mlxsteer.convert.layout import dims
from mlxsteer.convert.plan import OutputShard, Plan

GIB = 2**30
MAC_MEMORIES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 512)  # GiB that Apple sells

# macOS lets the GPU hold about three quarters of memory by default; `sysctl
# iogpu.wired_limit_mb` raises that. What is left to the system below 15% is too little.
DEFAULT_SHARE, RAISED_SHARE = 0.75, 0.85
WORKING_GIB = 2.0  # caches at some thousand tokens of context, activations, tokenizer


@dataclass(frozen=True)
class Sizes:
    """Exact bytes of a plan. `read_per_token` is what one decoded token reads of the weights."""

    tensors_in: int
    bytes_in: int
    tensors_out: int
    bytes_out: int
    dropped_bytes: int
    by_kind: dict[str, int]
    read_per_token: int
    read_of_experts: int
    mac_gib: int | None
    raise_limit: bool


def sizes(plan: Plan) -> Sizes:
    """The sizes of a plan."""
    memory, raised = mac_for(plan.nbytes)
    total, experts = read_per_token(plan)
    return Sizes(
        tensors_in=len(plan.checkpoint.tensors),
        bytes_in=plan.checkpoint.nbytes,
        tensors_out=plan.tensor_count,
        bytes_out=plan.nbytes,
        dropped_bytes=sum(entry.nbytes for entry in plan.dropped),
        by_kind=bytes_by_kind(plan.shards),
        read_per_token=total,
        read_of_experts=experts,
        mac_gib=memory,
        raise_limit=raised,
    )


def bytes_by_kind(shards: Iterable[OutputShard]) -> dict[str, int]:
    """Output bytes of experts, attention, indexer, shared, embed, head, and `untouched`."""
    found: Counter[str] = Counter()
    for shard in shards:
        for planned in shard.matrices:
            found[planned.matrix.kind] += sum(t.nbytes for t in planned.tensors)
        found["untouched"] += sum(plain.tensor.nbytes for plain in shard.plains)
    return dict(found)


def read_per_token(plan: Plan) -> tuple[int, int]:
    """Bytes of weights that one decoded token reads, and the part that is routed experts.

    Everything is read once but three things: of the experts, those that are chosen; of the
    embedding and of the hash table, one row.
    """
    size = dims(plan.checkpoint.config)
    rest = experts = 0
    for planned in plan.matrices():
        nbytes = sum(t.nbytes for t in planned.tensors)
        if planned.matrix.kind == "experts":
            experts += nbytes * size.active // size.experts
        elif planned.matrix.kind == "embed":
            rest += nbytes // size.vocab
        else:
            rest += nbytes
    for shard in plan.shards:
        for plain in shard.plains:
            hashed = plain.tensor.name.endswith(".tid2eid")
            rest += plain.tensor.nbytes // (size.vocab if hashed else 1)
    return rest + experts, experts


def mac_for(nbytes: int) -> tuple[int | None, bool]:
    """The smallest Mac (GiB) for weights of `nbytes`, and whether its GPU limit must be raised."""
    need = nbytes / GIB + WORKING_GIB
    for memory in MAC_MEMORIES:
        if need <= memory * RAISED_SHARE:
            return memory, need > memory * DEFAULT_SHARE
    return None, False
