"""A small byte-level BPE over a GGUF's own vocabulary and merges, in plain Python.

It follows llama.cpp's reading of `pre = smollm`: special tokens first (the longest wins), then
every digit alone, then GPT-2's pattern, then merges by rank, leftmost first. It shares no code
with the package or with the `tokenizers` library.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import regex
from gguf import GGUFReader

DIGIT = regex.compile(r"\p{N}")
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
CONTROL = 3


def byte_names() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in kept}
    others = [byte for byte in range(256) if byte not in names]
    return names | {byte: chr(256 + n) for n, byte in enumerate(others)}


class GgufBpe:
    """Encodes and decodes with what a GGUF file says of its tokenizer."""

    def __init__(self, path: Path) -> None:
        fields = GGUFReader(path).fields
        self.tokens = fields["tokenizer.ggml.tokens"].contents()
        kinds = fields["tokenizer.ggml.token_type"].contents()
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.specials = [t for t, kind in zip(self.tokens, kinds, strict=True) if kind == CONTROL]
        longest_first = sorted(self.specials, key=len, reverse=True)
        self.special = regex.compile("|".join(map(regex.escape, longest_first)))
        self.names = byte_names()

    def encode(self, text: str) -> list[int]:
        ids = []
        for special, plain in _split(self.special, text):
            ids += [self.ids[special]] if special else self._encode_plain(plain)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        pieces = [digit or rest for digit, rest in _split(DIGIT, text)]
        words = [match or rest for piece in pieces for match, rest in _split(WORDS, piece)]
        symbols = [symbol for word in words for symbol in self._merge(word)]
        # Some control characters are not in the vocabulary: llama.cpp leaves them out.
        return [self.ids[symbol] for symbol in symbols if symbol in self.ids]

    def _merge(self, word: str) -> list[str]:
        symbols = [self.names[byte] for byte in word.encode()]
        while True:
            pairs = list(pairwise(symbols))
            ranked = [(self.ranks[pair], i) for i, pair in enumerate(pairs) if pair in self.ranks]
            if not ranked:
                return symbols
            _, i = min(ranked)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]

    def decode(self, ids: list[int]) -> str:
        bytes_of = {name: byte for byte, name in self.names.items()}
        raw = b""
        for token in (self.tokens[i] for i in ids):
            raw += token.encode() if token in self.specials else bytes(bytes_of[c] for c in token)
        return raw.decode()


def _split(pattern: regex.Pattern, text: str) -> list[tuple[str, str]]:
    """`text` in order as (match, "") and ("", what lies between matches)."""
    parts, end = [], 0
    for match in pattern.finditer(text):
        if match.start() > end:
            parts.append(("", text[end : match.start()]))
        parts.append((match.group(), ""))
        end = match.end()
    return parts + ([("", text[end:])] if end < len(text) else [])
