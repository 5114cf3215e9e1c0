"""Where V4's thoughts and tool calls begin and end, in the tokens of its own tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

from mlxsteer.plan import ANSWER, THINK, TOOL
from mlxsteer.prompting import markers
from mlxsteer.rows import Control, Row
from tests.v4.test_chat_format import tokenizer

CALL = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="look">\n</｜DSML｜invoke>\n'
    "</｜DSML｜tool_calls>"
)


def _phases(text: str, first: int) -> tuple[list[int], list[int], Row]:
    model = SimpleNamespace(stamp={"architecture": "deepseek_v4"}, tokenizer=tokenizer())
    row = Row(Control(), prompt_length=0, first=first, markers=markers(model))
    tokens = tokenizer().encode(text, add_special_tokens=False)
    return tokens, row.phases(len(tokens), tokens), row


def test_tool_syntax_is_a_phase_of_its_own_from_its_first_control_token_to_its_last() -> None:
    tokens, phases, row = _phases(f"Let me look.{CALL}", ANSWER)
    inside = [token for token, phase in zip(tokens, phases, strict=True) if phase == TOOL]
    assert tokenizer().decode(inside).startswith("｜DSML｜tool_calls>")
    assert phases[:3] == [ANSWER] * 3
    assert row.phase == ANSWER


def test_a_thought_ends_at_its_closing_marker() -> None:
    tokens, phases, _ = _phases("Hm, let me see.</think>It is 4.", THINK)
    closing = tokens.index(tokenizer().convert_tokens_to_ids("</think>"))
    assert set(phases[:closing]) == {THINK}
    assert set(phases[closing:]) == {ANSWER}  # the closing marker's logits give the answer
