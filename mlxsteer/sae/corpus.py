"""What a dictionary is trained on: texts and chats, cut into windows of tokens.

Owns where text comes from (files, a Hub data set's files, Python's own documentation, the texts
of the contrast sets) and which positions count: the first position of a window is a sink, and
what every chat begins with is the same state each time, so neither is kept. Chats that the model
writes are `chats`' business.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxsteer.contrast import ContrastSet
from mlxsteer.contrast import available as available_sets
from mlxsteer.errors import SaeError, UsageError

if TYPE_CHECKING:
    from mlxsteer.model import Model

CONTEXT = 128  # tokens of a window
PIECE = 4000  # characters that are tokenized together
PYTHON_DOCS = "python-docs"  # a corpus that is wherever Python is
CONTRAST_SETS = "contrast-sets"  # and one that comes with us
AT_HAND = (PYTHON_DOCS, CONTRAST_SETS)
_HUB = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[\w./-]+)\Z")

Messages = list[dict[str, Any]]
Document = str | Messages


@dataclass(frozen=True)
class Window:
    """Tokens that run together; positions from `start` (at least 1) on are kept."""

    tokens: tuple[int, ...]
    start: int = 1

    @property
    def kept(self) -> int:
        return len(self.tokens) - self.start


def documents(source: str) -> Iterator[Document]:
    """The texts and chats of a source.

    source: a text file (one document), a `.jsonl` file (each line `{"text": …}` or
    `{"messages": […]}`), `hub:OWNER/REPO/FILE` (such a file of a Hub data set), `python-docs`,
    the reference topics that come with Python, or `contrast-sets`, the texts and answers of both
    poles of every set that has some. Raises SaeError.
    """
    if source == PYTHON_DOCS:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
        return
    if source == CONTRAST_SETS:
        yield from _set_texts()
        return
    path = _fetched(source) if source.startswith("hub:") else Path(source).expanduser()
    try:
        if path.suffix in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _record(line, f"{path}:{number}")
        else:
            yield path.read_text(encoding="utf-8")
    except OSError as error:
        raise SaeError(f"{path} cannot be read ({error.strerror}). Give a text file.") from None
    except UnicodeDecodeError:
        raise SaeError(f"{path} is not UTF-8 text. Give text or JSONL files.") from None


def _set_texts() -> Iterator[Document]:
    for name in available_sets():
        contrast = ContrastSet.load(name)
        if contrast.combine == "texts":
            yield from (*contrast.positive, *contrast.negative)
        elif contrast.combine == "answers":
            for answers in (contrast.positive, contrast.negative):
                for question, answer in zip(contrast.questions, answers, strict=True):
                    asked = {"role": "user", "content": question}
                    yield [asked, {"role": "assistant", "content": answer}]


def _record(line: str, where: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise SaeError(f"{where}: no JSON ({error}). Each line is one object.") from None
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        if isinstance(record.get("messages"), list):
            return list(record["messages"])
    raise SaeError(f'{where}: has neither "text" nor "messages".')


def _fetched(source: str) -> Path:
    match = _HUB.match(source)
    if not match:
        raise UsageError(f"{source!r} names no file on the Hub. Type hub:owner/repo/data.jsonl.")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(match["repo"], match["file"], repo_type="dataset"))
    except Exception as error:  # the client and its HTTP library raise a dozen kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SaeError(f"Cannot fetch {source}: {reason}. Check the name and network.") from None


def windows(model: Model, found: Iterable[Document], context: int = CONTEXT) -> Iterator[Window]:
    """Windows of at most `context` kept positions, each of one document.

    A text's windows begin with what the tokenizer puts before every text, if anything.
    """
    opening = list(model.tokenizer.encode(""))
    shared = len(chat_opening(model)) if _can_chat(model) else 0
    for document in found:
        if isinstance(document, str):
            tokens = [token for piece in _pieces(document) for token in _encoded(model, piece)]
            start = max(1, len(opening))
            for at in range(0, len(tokens), context):
                window = Window((*opening, *tokens[at : at + context]), start)
                if window.kept > 0:
                    yield window
        elif _can_chat(model):
            yield chat_window(model, document, shared, context)
        else:
            raise SaeError(f"{model.label} has no chat template: give it texts, not chats.")


def _encoded(model: Model, text: str) -> list[int]:
    return list(model.tokenizer.encode(text, add_special_tokens=False))


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end with a line, because tokenizers warn of long texts."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length > PIECE:
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)


def chat_opening(model: Model) -> list[int]:
    """The tokens that every chat of one question begins with."""
    one, other = model.render("A"), model.render("The")
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differing, 0)]


def chat_window(model: Model, messages: Messages, shared: int, context: int) -> Window:
    """A chat that ends with the assistant's answer (or with a question, if there is none)."""
    if messages and messages[-1].get("role") == "assistant":
        answer = str(messages[-1].get("content", ""))
        tokens = model.render(messages[:-1])
        tokens = [*tokens, *_encoded(model, answer)]
    else:
        tokens = model.render(messages)
    start = max(1, min(shared, len(tokens) - 1))
    return Window(tuple(tokens[: start + context]), start)


def _can_chat(model: Model) -> bool:
    return bool(getattr(model.tokenizer, "has_chat_template", False))


def chosen(found: Sequence[Window], tokens: int, seed: int) -> list[Window]:
    """Windows in an order that `seed` decides, until `tokens` positions are kept."""
    order = random.Random(seed).sample(range(len(found)), len(found))
    picked: list[Window] = []
    for index in order:
        if tokens <= 0:
            break
        picked.append(found[index])
        tokens -= found[index].kept
    return picked


def shared_out(sources: Sequence[Sequence[Window]], tokens: int, seed: int) -> list[Window]:
    """Windows of several sources until `tokens` positions are kept, as evenly as they can give.

    A source with less than its part is taken whole, so a small one is not lost beside a large.
    """
    found: list[Window] = []
    smallest_first = sorted(sources, key=lambda source: sum(window.kept for window in source))
    for index, source in enumerate(smallest_first):
        part = chosen(source, round(tokens / (len(sources) - index)), seed)
        tokens -= sum(window.kept for window in part)
        found += part
    return found


def digest(found: Sequence[Window]) -> str:
    """sha256 of the windows: what data a run was given."""
    state = hashlib.sha256()
    for window in found:
        state.update(repr((window.tokens, window.start)).encode())
    return state.hexdigest()
