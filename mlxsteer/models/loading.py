"""From a folder to a model in memory, through mlx-lm.

Checks before any weight is read; decides the precision that activations are computed in. Knows
nothing of names (`names`) or steering, and runs no code from a checkpoint.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxsteer.errors import MlxsteerError, ModelError, near_matches
from mlxsteer.models import memory
from mlxsteer.models.folder import OWN_ARCHITECTURES, Folder, check_folder

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Loaded:
    """A model in memory. `dtype` is the type that activations are computed in."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path
    dtype: str


# Loading


def load_model_and_tokenizer(
    path: Path,
    *,
    dtype: str | None = None,
    activation_rounding: bool | None = None,
    force: bool = False,
) -> Loaded:
    """Load the model folder at `path`.

    `dtype` None computes in the stored type on Metal, and in float32 on CPU, where quantised
    matrices of ordinary models are also unpacked to float32 if they fit: half precision and
    packed products are several times slower there. A given `dtype` casts every floating
    parameter, and never a packed one. `activation_rounding` is DeepSeek-V4's own switch.
    `force` overrules the memory check.

    Raises ModelError for a folder that cannot be loaded, does not fit, or would run code.
    """
    import mlx.core as mx

    folder = check_folder(path)
    classes = model_classes(folder.config)
    overrides = _rounding_override(folder, classes, activation_rounding)
    target = _target_dtype(dtype)
    _check_memory(folder, target, force)
    model, config = _load_weights(folder, classes, overrides)
    if target is not None:
        cast_floats(model, target)
        _refuse_half_experts(model, folder, target)
    if target == mx.float32 and _on_cpu() and not _is_own(folder):
        unpack_where_it_fits(model, folder.config)
    _evaluate(model, path)
    tokenizer = _load_tokenizer(path, config)
    return Loaded(model, tokenizer, config, path, _activation_dtype(model))


def model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """The model and argument classes for a config: ours, else mlx-lm's. ModelError when none."""
    kind = config["model_type"]
    if own := OWN_ARCHITECTURES.get(kind):
        module = importlib.import_module(own)
        return module.Model, module.ModelArgs
    from mlx_lm.utils import _get_classes

    try:
        return _get_classes(config)
    except (ValueError, AttributeError) as error:
        import mlx_lm.models

        known = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
        raise ModelError(
            f"The architecture {kind!r} is not one that mlx-lm or mlxsteer can run."
            f"{near_matches(kind, [*known, *OWN_ARCHITECTURES])} A newer mlx-lm may know it:"
            " `pip install -U mlx-lm`."
        ) from error


def _is_own(folder: Folder) -> bool:
    return folder.config["model_type"] in OWN_ARCHITECTURES


def _rounding_override(
    folder: Folder, classes: tuple[type, type], activation_rounding: bool | None
) -> dict[str, Any]:
    if activation_rounding is None:
        return {}
    arguments = classes[1]
    names = {f.name for f in fields(arguments)} if is_dataclass(arguments) else set()
    if "activation_rounding" not in names:
        raise ModelError(
            f"activation_rounding is a switch of DeepSeek-V4; {folder.path.name}"
            f" ({folder.config['model_type']}) has none. Leave it out."
        )
    return {"activation_rounding": activation_rounding}


def _load_weights(
    folder: Folder, classes: tuple[type, type], overrides: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    from mlx_lm.utils import load_model

    def get_classes(config: dict[str, Any]) -> tuple[type, type]:
        return classes

    # Code that a folder brings for other programs is never run: `check_folder` let it pass only
    # where the architecture is ours.
    overrides = {**overrides, "model_file": None}
    # Lazy: parameters are read as they are cast, so both copies never exist at once.
    return _explained(
        folder.path,
        lambda: load_model(
            folder.path, lazy=True, model_config=overrides, get_model_classes=get_classes
        ),
    )


def _evaluate(model: nn.Module, path: Path) -> None:
    import mlx.core as mx

    _explained(path, lambda: mx.eval(model.parameters()))


def _load_tokenizer(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    from mlx_lm.utils import load_tokenizer

    return _explained(
        path,
        lambda: load_tokenizer(
            path, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id")
        ),
    )


def _explained(path: Path, step: Callable[[], Any]) -> Any:
    try:
        return step()
    except MlxsteerError:
        raise
    except Exception as error:  # each architecture and tokenizer fails in its own way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # "Missing 2 parameters:" alone would not say which: a list's first entry comes with it.
        reason = " ".join(lines[:2]) if lines[0].rstrip().endswith(":") else lines[0]
        reason = " ".join(reason.split()).rstrip(".,")
        raise ModelError(
            f"{path} cannot be loaded: {reason} ({type(error).__name__}). Its config, weights"
            " and tokenizer do not fit together; fetch or convert the model again."
        ) from error


# Types and memory


def _on_cpu() -> bool:
    import mlx.core as mx

    return mx.default_device() == mx.Device(mx.cpu)


def _target_dtype(dtype: str | None) -> mx.Dtype | None:
    import mlx.core as mx

    if dtype is None:
        return mx.float32 if _on_cpu() else None
    if dtype not in DTYPES:
        raise ModelError(
            f"There is no dtype {dtype!r}.{near_matches(dtype, DTYPES)} Use one of:"
            f" {', '.join(DTYPES)}, or leave it out."
        )
    return getattr(mx, dtype)


def _check_memory(folder: Folder, target: mx.Dtype | None, force: bool) -> None:
    size = target.size if target is not None else None
    need = memory.estimate(folder.config, folder.weight_bytes(size), element_bytes=size or 2)
    memory.check(need, label=folder.path.name, force=force)


def cast_floats(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast the floating parameters; packed integers stay.

    So do parameters that the model's `cast_predicate` keeps from a narrower type, such as
    DeepSeek-V4's mixing matrices and router biases.
    """
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    may_narrow = getattr(model, "cast_predicate", None) or (lambda path: True)

    def cast(path: str, array: mx.array) -> mx.array:
        wanted = dtype == mx.float32 or may_narrow(path)
        return array.astype(dtype) if wanted and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def _refuse_half_experts(model: nn.Module, folder: Folder, target: mx.Dtype) -> None:
    import mlx.core as mx
    from mlx_lm.models.switch_layers import SwitchLinear

    if target == mx.float32 or not _on_cpu():
        return
    if any(isinstance(module, SwitchLinear) for _, module in model.named_modules()):
        raise ModelError(
            f"{folder.path.name} has experts that are not quantised, and on CPU MLX multiplies"
            " those in float32 only. Leave the dtype out."
        )


def unpack_where_it_fits(model: nn.Module, config: dict[str, Any]) -> bool:
    """Replace quantised matrices and embeddings by float32 ones, if memory allows; say whether.

    Experts stay packed: they are most of a model's bytes, and few are read per token.
    """
    from mlx.utils import tree_flatten, tree_unflatten

    packed = _packed_modules(model)
    parameters: Any = tree_flatten(model.parameters())
    stored = sum(array.nbytes for _, array in parameters)
    unpacked = sum(4 * module.weight.size * 32 // module.bits for _, module in packed)
    # Both copies: for a moment they exist together.
    need = memory.estimate(config, stored + unpacked, element_bytes=4)
    if not packed or not memory.fits(need):
        return False
    model.update_modules(tree_unflatten([(name, _unpacked(module)) for name, module in packed]))
    return True


def _packed_modules(model: nn.Module) -> list[tuple[str, Any]]:
    import mlx.nn as nn

    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return [
        (name, module)
        for name, module in model.named_modules()
        # A global scale (nvfp4) is applied inside the packed product; such a layer stays.
        if isinstance(module, kinds) and "global_scale" not in module
    ]


def _unpacked(module: Any) -> nn.Module:
    import mlx.core as mx
    import mlx.nn as nn

    weight = mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        dtype=mx.float32,
    )
    # Built with one row, then given its weight: a full-size random start would cost time.
    if isinstance(module, nn.QuantizedEmbedding):
        plain: nn.Module = nn.Embedding(1, 1)
    else:
        plain = nn.Linear(1, 1, bias="bias" in module)
        if "bias" in module:
            plain.bias = module.bias
    plain.weight = weight
    return plain


def _activation_dtype(model: nn.Module) -> str:
    """The type of what the embedding puts out; bfloat16 for the microscaling formats."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    parameters: Any = tree_flatten(model.parameters())
    floating = [
        (name, array) for name, array in parameters if mx.issubdtype(array.dtype, mx.floating)
    ]
    embedding = [array for name, array in floating if "embed" in name]
    chosen = embedding or [array for _, array in floating]
    return str(chosen[0].dtype).removeprefix("mlx.core.") if chosen else "bfloat16"
