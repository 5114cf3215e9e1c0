"""What a source holds: its configuration, its tensors, its files. Data only, no I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mlxsteer.convert.errors import ConvertError, some
from mlxsteer.convert.headers import TensorEntry

REPO_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
INDEX_NAME = "model.safetensors.index.json"

# Copied beside the weights. A fixed list: nothing else of a source is ever opened, code least.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "LICENSE",
)


@dataclass(frozen=True)
class ShardFile:
    """A weight file of the source; `sha256` where somebody published it, else None."""

    name: str
    nbytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A source as its headers describe it.

    `name` is a Hub repo or a folder, `revision` a commit where one is known.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    shards: Mapping[str, ShardFile]
    side_files: tuple[str, ...] = ()
    revision: str | None = None
    weights_are_here: bool = True

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def on_hub(self) -> bool:
        return REPO_NAME.fullmatch(self.name) is not None

    @property
    def public_name(self) -> str:
        """The name to publish: a repo, or a folder without the user's path to it."""
        return self.name if self.on_hub else PurePosixPath(self.name).name


def safe_name(name: object, where: str) -> str:
    """`name` if it stays inside its folder; raises ConvertError otherwise.

    An index comes from a stranger: `../x`, absolute paths and drive letters must not be followed.
    """
    text = str(name)
    parts = PurePosixPath(text).parts
    inside = parts and ".." not in parts and not text.startswith("/")
    if not isinstance(name, str) or not inside or any(c in text for c in "\\:\0\n"):
        raise ConvertError(
            f"{where} names the file {text!r}, which points outside its folder. Nothing was read;"
            " get the checkpoint from its publisher."
        )
    return text


def check_weight_map(index: object, where: str) -> dict[str, str]:
    """The `weight_map` of an index, with every file name proved harmless."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{where} has no weight_map. Download it again.")
    for shard in set(map(str, weight_map.values())):
        safe_name(shard, where)
    return {str(name): str(shard) for name, shard in weight_map.items()}


def check_against_index(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry], where: str
) -> None:
    """Index and headers must name the same tensors in the same files."""
    wrong = [n for n, s in weight_map.items() if n not in tensors or tensors[n].shard != s]
    if wrong:
        raise ConvertError(
            f"{where} places {len(wrong):,} tensors where the files do not have them:"
            f" {some(sorted(wrong))}. Download the index and the named files again."
        )
