"""Writes tests/fixtures/sae: folders that the `sae-lens` package wrote or reads, and what it
computes with them. Run where that package is installed:

    python tests/oracles/sae_lens_files.py

Every folder holds a tiny autoencoder with random weights, and `golden.safetensors`: states `x`,
and `acts` and `out` as sae-lens encodes and decodes them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

WIDTH, FEATURES, STATES = 8, 20, 12
V6: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "standard-no-b-dec": {"architecture": "standard", "apply_b_dec_to_input": False},
    "topk": {"architecture": "topk", "k": 4},
    "topk-rescaled": {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "constant-norm": {
        "architecture": "standard",
        "normalize_activations": "constant_norm_rescale",
    },
    "layer-norm": {"architecture": "jumprelu", "normalize_activations": "layer_norm"},
    "average-norm": {
        "architecture": "standard",
        "normalize_activations": "expected_average_only_in",
    },
}
METADATA = {"model_name": "tiny", "hook_name": "blocks.2.hook_resid_post"}
INPUT_SCALE = 0.37


def random_weights(sae: Any) -> None:
    for parameter in sae.parameters():
        parameter.data = 0.5 * torch.randn_like(parameter)
    if hasattr(sae, "threshold"):
        sae.threshold.data = sae.threshold.data.abs()


def golden(sae: Any, folder: Path, **more: torch.Tensor) -> None:
    x = 2.0 * torch.randn(STATES, WIDTH) + 0.3
    with torch.no_grad():
        acts = sae.encode(x)
        out = sae.decode(acts)
    save_file({"x": x, "acts": acts, "out": out, **more}, folder / "golden.safetensors")


def write_v6(root: Path) -> None:
    from sae_lens import SAE

    for name, settings in V6.items():
        sae = SAE.from_dict(
            {"d_in": WIDTH, "d_sae": FEATURES, "metadata": dict(METADATA), **settings}
        )
        random_weights(sae)
        sae.save_model(root / name)
        golden(SAE.load_from_disk(root / name), root / name)
        if name == "average-norm":
            sae.fold_activation_norm_scaling_factor(INPUT_SCALE)
            golden(sae, root / name, scale=torch.tensor(INPUT_SCALE))


def write_old(root: Path) -> None:
    """The layouts before version 6, which sae-lens still reads."""
    from sae_lens import SAE

    flat = {"d_in": WIDTH, "d_sae": FEATURES, "dtype": "float32", "device": "cpu"}
    flat |= {"model_name": "tiny", "hook_name": "blocks.2.hook_resid_pre", "hook_layer": 2}
    flat |= {"finetuning_scaling_factor": False, "normalize_activations": "none"}
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    cases = {
        "old-standard": ("standard", {}),
        "old-hook-point": ("standard", {"hook_point": "blocks.2.hook_resid_pre"}),
        "old-topk": ("topk", {"architecture": "standard", **topk}),
        "old-jumprelu": ("jumprelu", {"architecture": "jumprelu", "activation_fn_str": "relu"}),
        "old-gated": ("gated", {"architecture": "gated"}),
    }
    for name, (source, changes) in cases.items():
        (root / name).mkdir()
        weights = load_file(root / source / "sae_weights.safetensors")
        save_file(weights, root / name / "sae_weights.safetensors")
        config = {**flat, **changes}
        if "hook_point" in config:
            del config["hook_name"]
        (root / name / "cfg.json").write_text(json.dumps(config))
        golden(SAE.load_from_disk(root / name), root / name)


def write_batchtopk(root: Path) -> None:
    """A training checkpoint (its own threshold) and what sae-lens makes of it for use."""
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    for name, rescale in (("batchtopk", False), ("batchtopk-rescaled", True)):
        config = BatchTopKTrainingSAEConfig(
            d_in=WIDTH, d_sae=FEATURES, k=4, rescale_acts_by_decoder_norm=rescale
        )
        sae = BatchTopKTrainingSAE(config)
        random_weights(sae)
        sae.topk_threshold = torch.tensor(0.8, dtype=torch.double)
        sae.save_model(root / name)
        sae.save_inference_model(root / f"{name}-saved")
        golden(SAE.load_from_disk(root / f"{name}-saved"), root / f"{name}-saved")
        shutil.copy(root / f"{name}-saved" / "golden.safetensors", root / name)


def write_gemma(root: Path) -> None:
    """Gemma Scope's file: a JumpReLU that does not take b_dec off its input."""
    from sae_lens import SAE

    settings = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    sae = SAE.from_dict({"d_in": WIDTH, "d_sae": FEATURES, **settings})
    random_weights(sae)
    folder = root / "gemma-scope"
    folder.mkdir()
    state = {name: tensor.numpy() for name, tensor in sae.state_dict().items()}
    np.savez(folder / "params.npz", **state)
    golden(sae, folder)


def main() -> None:
    root = Path(__file__).parent.parent / "fixtures" / "sae"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    torch.manual_seed(0)
    for write in (write_v6, write_old, write_batchtopk, write_gemma):
        write(root)
    print(f"{len(list(root.iterdir()))} folders in {root}", file=sys.stderr)


if __name__ == "__main__":
    main()
