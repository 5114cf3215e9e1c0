"""The configuration of a DeepSeek-V4 model: read from `config.json`, checked, nothing guessed.

Every library fills a missing `compress_ratios` differently, so a config that leaves out what
decides the architecture is refused by name instead of completed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mlxsteer.errors import ModelError

WINDOW_ONLY, SPARSE, HEAVY = 0, 4, 128  # compress ratios: no rows, CSA, HCA
RATIOS = (WINDOW_ONLY, SPARSE, HEAVY)
# Not run, though mlx-lm may have a module: the real checkpoints hold more than it computes.
REFUSED_ARCHITECTURES = {"deepseek_v41": "DeepSeek-V4.1", "deepseek_v41_text": "DeepSeek-V4.1"}
KV_ROUNDING_BLOCK = 64
INDEX_ROUNDING_BLOCK = 32
STREAMS = 4

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "num_hash_layers",
    "compress_ratios",
)


@dataclass(frozen=True)
class ModelArgs:
    """Sizes and constants, under the names of the official `config.json`.

    `activation_rounding` switches the rounding that the model was trained with: e4m3 for kv
    rows, Hadamard and e2m1 for the index. It is on unless the dimensions cannot be rounded
    (blocks of 64 and 32), as in tiny test models.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    compress_ratios: tuple[int, ...]
    model_type: str = "deepseek_v4"
    n_shared_experts: int = 1
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    sliding_window: int = 128
    hc_mult: int = STREAMS
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: Mapping[str, Any] | None = None
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    scoring_func: str = "sqrtsoftplus"
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    num_key_value_heads: int = 1
    max_position_embeddings: int = 1048576
    activation_rounding: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelArgs:
        """Read a parsed `config.json`. ModelError says what cannot be run, and why."""
        _refuse_other_models(config)
        _require_keys(config)
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in config.items() if k in known and v is not None}
        values["compress_ratios"] = _ratios(config)
        values.setdefault("activation_rounding", _can_round(values))
        args = cls(**values)
        _check_sizes(args)
        _check_constants(args)
        return args

    @property
    def nope_head_dim(self) -> int:
        """Dims of a kv row that carry no position (448 of 512)."""
        return self.head_dim - self.qk_rope_head_dim


def is_0731_config(config: Mapping[str, Any]) -> bool:
    """Whether a parsed `config.json` is of the 0731 release (other reasoning-effort levels)."""
    return any(key.startswith("dspark_") for key in config)


def refuse_architecture(config: Mapping[str, Any]) -> None:
    """ModelError when the config is of a model that is refused by name."""
    kind = config.get("model_type")
    if name := REFUSED_ARCHITECTURES.get(str(kind)):
        raise ModelError(
            f"This is {name} (model_type {kind}): another architecture than DeepSeek-V4 (n-gram"
            " tables, compressed rows shared between layers), which cannot be run or steered"
            " here. Give --model a DeepSeek-V4-Flash or -Pro folder instead."
        )


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    refuse_architecture(config)
    kind = config.get("model_type")
    if kind != "deepseek_v4":
        raise ModelError(
            f"This config has model_type {kind!r}, not 'deepseek_v4'. Load it as an mlx-lm model."
        )
    if config.get("vision_n_layers") or config.get("vision_config"):
        raise ModelError(
            "This is a DeepSeek-V4 vision checkpoint (vision layers in config.json), which is"
            " not supported. Use the text-only DeepSeek-V4-Flash."
        )


def _require_keys(config: Mapping[str, Any]) -> None:
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise ModelError(
            f"config.json lacks {', '.join(missing)}. These decide the architecture and are not"
            " guessed; take config.json from the model's own repository."
        )


def _ratios(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers' ratios; entries beyond the last layer belong to draft blocks."""
    given, n = config["compress_ratios"], int(config["num_hidden_layers"])
    if not isinstance(given, (list, tuple)) or len(given) < n:
        raise ModelError(
            f"compress_ratios must list at least {n} entries, one per layer. Take config.json"
            " from the model's own repository."
        )
    unknown = sorted({r for r in given[:n] if r not in RATIOS}, key=str)
    if unknown:
        raise ModelError(
            f"compress_ratios contains {', '.join(map(str, unknown))}; DeepSeek-V4 has 0, 4 and"
            " 128. Other ratios belong to another architecture."
        )
    return tuple(int(r) for r in given[:n])


def _can_round(values: Mapping[str, Any]) -> bool:
    nope = int(values["head_dim"]) - int(values["qk_rope_head_dim"])
    index = int(values.get("index_head_dim", ModelArgs.index_head_dim))
    return nope % KV_ROUNDING_BLOCK == 0 and _is_roundable_index(index)


def _is_roundable_index(width: int) -> bool:
    return width % INDEX_ROUNDING_BLOCK == 0 and width & (width - 1) == 0


def _check_sizes(args: ModelArgs) -> None:
    heads, rd = args.num_attention_heads, args.qk_rope_head_dim
    fits_rounding = args.nope_head_dim % KV_ROUNDING_BLOCK == 0 and _is_roundable_index(
        args.index_head_dim
    )
    problems = {
        f"o_groups {args.o_groups} must divide num_attention_heads {heads}": heads % args.o_groups,
        "qk_rope_head_dim must be even and at most head_dim": rd % 2 or rd > args.head_dim,
        "index_head_dim must be at least qk_rope_head_dim": args.index_head_dim < rd,
        "num_experts_per_tok exceeds n_routed_experts": args.num_experts_per_tok
        > args.n_routed_experts,
        "activation_rounding needs blocks of 64 kv dims without position and a power-of-two"
        " index_head_dim of at least 32; set it to false": args.activation_rounding
        and not fits_rounding,
    }
    for text, wrong in problems.items():
        if wrong:
            raise ModelError(f"config.json is not usable: {text}.")


def _check_constants(args: ModelArgs) -> None:
    expected = {
        "hc_mult": STREAMS,
        "num_key_value_heads": 1,
        "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
    for key, value in expected.items():
        if getattr(args, key) != value:
            raise ModelError(
                f"config.json has {key} = {getattr(args, key)!r}; DeepSeek-V4 has {value!r}, and"
                " no other value is implemented."
            )
    scaling = args.rope_scaling or {}
    kind = scaling.get("type", scaling.get("rope_type"))
    if any(args.compress_ratios) and kind != "yarn":
        raise ModelError(
            f"config.json has rope_scaling type {kind!r}; layers with compressed rows need"
            " 'yarn'. Take config.json from the model's own repository."
        )
