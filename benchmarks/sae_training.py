"""BatchTopK dictionaries from the same states and budget: ours beside the `sae-lens` package's.

Both see the same rows in the same order and are scored by the same function on rows that
neither saw. sae-lens runs in its own environment, because it brings a great deal along:

    python -m venv /somewhere/peer && /somewhere/peer/bin/pip install sae-lens
    python benchmarks/sae_training.py --peer /somewhere/peer/bin/python

Without --peer only ours runs. States are read once and kept in the cache folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAYER = 15


def main() -> None:
    options = _options()
    if options.worker:
        _train_with_sae_lens(json.loads(options.worker))
        return
    import mlxsteer  # noqa: F401  before mlx, for its fast BLAS
    from mlxsteer.sae.train import Recipe, train

    data = _states(options)
    print("by             rate  steps  seconds  explained     L0    dead")
    for rate in options.rate:
        recipe = Recipe(
            features=options.features,
            k=options.k,
            epochs=options.epochs,
            batch=options.batch,
            rate=rate,
            dead_after=options.dead_after,
        )
        steps = recipe.steps(data.n_train)
        started = time.perf_counter()
        dictionary, _ = train(data, recipe)
        _row("mlxsteer", rate, steps, time.perf_counter() - started, dictionary, data)
        if options.peer:
            _row("sae-lens", rate, steps, *_peer(options.peer, data, recipe), data)


def _row(by: str, rate: float, steps: int, seconds: float, dictionary: Any, data: Any) -> None:
    from mlxsteer.sae import score

    fit, _ = score.fit(dictionary, data)
    print(
        f"{by:<10} {rate:>8g} {steps:>6} {seconds:>8.0f}"
        f" {fit.explained_variance:>10.4f} {fit.l0:>6.1f} {fit.dead:>7.2%}",
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has sae-lens")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rate", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--dead-after", type=int, default=50_000)
    parser.add_argument("--states", metavar="FILE", help="a buffer read before: bfloat16 rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _states(options: argparse.Namespace) -> Any:
    import mlxsteer
    from mlxsteer.files import cache_dir
    from mlxsteer.sae import activations, build

    model = mlxsteer.load(options.model)
    if options.states:
        path = Path(options.states)
        rows = path.stat().st_size // (activations.BYTES * model.d_model)
        data = activations.Activations(path, model.d_model, round(0.96 * rows), rows)
        return data.without_massive()
    order = build.Order(LAYER, tokens=options.tokens)
    folder = cache_dir() / "sae" / f"benchmark-{build.work_folder(model, order).name}"
    return activations.capture(model, build.gather(model, order), LAYER, order.site, folder)


def _peer(python: str, data: Any, recipe: Any) -> tuple[float, Any]:
    """(seconds, the dictionary) of sae-lens in its own process."""
    from mlxsteer.sae import folder

    with tempfile.TemporaryDirectory() as out:
        work = {
            "states": str(data.path),
            "width": data.d_model,
            "held_from": data.held_from,
            "massive": data.massive,
            "n_rows": data.n_rows,
            "features": recipe.features,
            "k": recipe.k,
            "batch": recipe.batch,
            "steps": recipe.steps(data.n_train),
            "rate": recipe.rate,
            "dead_steps": max(1, recipe.dead_after // recipe.batch),
            "seed": recipe.seed,
            "out": out,
        }
        command = [python, __file__, "--worker", json.dumps(work)]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return float(result.stdout.split()[-1]), folder.read(out)


def _train_with_sae_lens(work: dict[str, Any]) -> None:
    """In the peer's environment: train, save for inference, print the seconds."""
    import numpy as np
    import torch
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    shape = (work["n_rows"], work["width"])
    states = np.memmap(work["states"], np.int16, "r", shape=shape)
    rows = np.setdiff1d(np.arange(work["held_from"]), work["massive"])

    def batches() -> Any:
        epoch = 0
        while True:
            order = np.random.default_rng([work["seed"], epoch]).permutation(rows)
            for at in range(0, len(order) - work["batch"] + 1, work["batch"]):
                bits = torch.tensor(states[order[at : at + work["batch"]]])
                yield bits.view(torch.bfloat16).float()
            epoch += 1

    torch.manual_seed(work["seed"])
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=work["width"],
            d_sae=work["features"],
            k=work["k"],
            normalize_activations="expected_average_only_in",
        )
    )
    config = SAETrainerConfig(
        total_training_samples=work["steps"] * work["batch"],
        train_batch_size_samples=work["batch"],
        lr=work["rate"],
        lr_end=0.0,
        lr_warm_up_steps=work["steps"] // 20,
        lr_decay_steps=3 * work["steps"] // 10,
        dead_feature_window=work["dead_steps"],
        n_batches_for_norm_estimate=8,
        logger=LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=2**31 - 1),
    )
    started = time.perf_counter()
    trained = SAETrainer(cfg=config, sae=sae, data_provider=batches()).fit()
    seconds = time.perf_counter() - started
    trained.save_inference_model(work["out"])
    print(seconds)


if __name__ == "__main__":
    sys.exit(main())
