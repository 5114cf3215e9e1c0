"""What an answer cost, in the words of each API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxsteer.server.running import Written


def open_usage(written: Sequence[Written]) -> dict[str, Any]:
    """OpenAI's chat and text completions: the prompt is counted once, however many answers."""
    first = written[0].generation
    answered = sum(answer.generation.tokens for answer in written)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": answered,
        "total_tokens": first.prompt_tokens + answered,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": sum(answer.reasoning_tokens for answer in written)
        },
    }


def responses_usage(written: Written) -> dict[str, Any]:
    """OpenAI's responses."""
    generation = written.generation
    return {
        "input_tokens": generation.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": generation.cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": generation.tokens,
        "output_tokens_details": {"reasoning_tokens": written.reasoning_tokens},
        "total_tokens": generation.prompt_tokens + generation.tokens,
    }


def anthropic_usage(written: Written) -> dict[str, Any]:
    """Anthropic's messages: tokens found in a cache are not among `input_tokens`."""
    generation = written.generation
    return {
        "input_tokens": generation.prompt_tokens - generation.cached_tokens,
        "cache_read_input_tokens": generation.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": generation.tokens,
    }
