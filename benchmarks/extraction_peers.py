"""The other side of benchmarks/extraction.py: repeng and steering-vectors, timed on request.

Runs in an environment of its own (they need transformers < 5 and numpy < 2) and imports nothing
of mlxsteer. Each line on stdin names a tool; the reply is a line of JSON on stdout.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from repeng import ControlVector, DatasetEntry
from steering_vectors import train_steering_vector
from transformers import AutoModelForCausalLM, AutoTokenizer

Pairs = Sequence[tuple[str, str]]
Directions = dict[int, np.ndarray]


class Counter:
    """Counts what goes through a model: real tokens, and positions with padding."""

    def __init__(self, model: Any) -> None:
        self.tokens = self.positions = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, arguments: Any, named: dict[str, Any]) -> None:
        self.tokens += int(named["attention_mask"].sum())
        self.positions += named["attention_mask"].numel()


def repeng(model: Any, tokenizer: Any, pairs: Pairs, layers: list[int], batch: int) -> Directions:
    """Its PCA around each pair's own middle; its default removes the mean difference instead."""
    dataset = [DatasetEntry(positive, negative) for positive, negative in pairs]
    vector = ControlVector.train(
        model,
        tokenizer,
        dataset,
        hidden_layers=layers,
        batch_size=batch,
        method="pca_center",
    )
    return vector.directions


def steering_vectors(
    model: Any, tokenizer: Any, pairs: Pairs, layers: list[int], batch: int
) -> Directions:
    """Its mean difference at the last token; a batch holds one pole of `batch` pairs."""
    vector = train_steering_vector(
        model, tokenizer, pairs, layers=layers, read_token_index=-1, batch_size=batch
    )
    return {layer: array.numpy() for layer, array in vector.layer_activations.items()}


TOOLS: dict[str, Callable[..., Directions]] = {
    "repeng": repeng,
    "steering-vectors": steering_vectors,
}


def main() -> None:
    folder, task_file = map(Path, sys.argv[1:])
    task = json.loads(task_file.read_text())
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    counter = Counter(model)
    pairs = [tuple(pair) for pair in task["pairs"]]
    replies = sys.stdout
    for line in sys.stdin:
        tool = line.strip()
        counter.tokens = counter.positions = 0
        start, worked = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            found = TOOLS[tool](model, tokenizer, pairs, task["layers"], task["batch"])
        seconds, cpu = time.perf_counter() - start, time.process_time() - worked
        np.savez(task_file.with_name(f"{tool}.npz"), **{str(k): v for k, v in found.items()})
        counts = {"tokens": counter.tokens, "positions": counter.positions}
        print(json.dumps({"seconds": seconds, "cpu": cpu, **counts}), file=replies, flush=True)


if __name__ == "__main__":
    main()
