# ruff: noqa: E501
"""The body of the Jinja chat template. `chat_format` sets the constants before it and owns the rules."""

BODY = r"""
{%- set thinking = enable_thinking | default(false) -%}
{%- set state = namespace(tools=tools | default(none), last=-1, ids=[], system=false) -%}
{%- set system_tools = state.tools -%}
{%- for m in messages -%}
  {%- if m.tools -%}{%- set state.tools = m.tools -%}{%- endif -%}
  {%- if m.role in ["user", "tool", "developer"] -%}{%- set state.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- set drop = drop_thinking | default(true) and not state.tools -%}
{%- set turn = namespace(start=state.last) -%}
{%- for m in messages | reverse -%}
  {%- set i = messages | length - 1 - loop.index0 -%}
  {%- if i == turn.start - 1 and m.role in ["user", "tool"] and messages[i + 1].role in ["user", "tool"] -%}
    {%- set turn.start = i -%}
  {%- endif -%}
{%- endfor -%}
{%- macro instructions(tools, response_format) -%}
  {%- if tools -%}
    {{- "\n\n" + TOOLS_BEFORE -}}
    {%- for t in tools -%}{{- (t.function if t.function is defined else t) | tojson -}}{{- "\n" if not loop.last -}}{%- endfor -%}
    {{- TOOLS_AFTER -}}
  {%- endif -%}
  {%- if response_format -%}{{- "\n\n" + RESPONSE_FORMAT -}}{{- response_format | tojson -}}{%- endif -%}
{%- endmacro -%}
{{- BOS -}}
{%- if thinking -%}{{- EFFORT.get(reasoning_effort | default("low", true), "") -}}{%- endif -%}
{%- if system_tools and not (messages and messages[0].role == "system") -%}{{- instructions(system_tools, none) -}}{%- endif -%}
{%- for m in messages -%}
  {%- set i = loop.index0 -%}
  {%- set before = messages[i - 1].role if i else "" -%}
  {%- set next = namespace(role="") -%}
  {%- for t in messages[i + 1:] -%}
    {%- if not next.role and not (t.role == "developer" and thinking and drop and i + 1 + loop.index0 < turn.start) -%}{%- set next.role = t.role -%}{%- endif -%}
  {%- endfor -%}
  {%- set reasons = thinking and (not drop or i >= turn.start) -%}
  {%- if m.role == "system" -%}
    {{- m.content or "" -}}
    {{- instructions(system_tools if i == 0 and system_tools else m.tools, m.response_format) -}}
  {%- elif m.role == "latest_reminder" -%}
    {{- REMINDER + m.content -}}
  {%- elif m.role == "developer" -%}
    {%- if not (thinking and drop and i < turn.start) -%}
      {{- USER + (m.content or "") -}}{{- instructions(m.tools, m.response_format) -}}
    {%- endif -%}
  {%- elif m.role in ["user", "tool"] -%}
    {{- USER if before not in ["user", "tool"] else "\n\n" if m.role == "user" or before == "user" -}}
    {%- if m.role == "user" -%}
      {{- m.content or "" -}}
    {%- else -%}
      {%- if before != "tool" -%}
        {%- set run = namespace(results=[], open=true) -%}
        {%- for t in messages[i:] -%}
          {%- if t.role != "tool" -%}{%- set run.open = false -%}{%- endif -%}
          {%- if run.open -%}{%- set run.results = run.results + [t] -%}{%- endif -%}
        {%- endfor -%}
        {%- set sorted = namespace(results=[]) -%}
        {%- for id in state.ids -%}{%- for t in run.results if t.tool_call_id == id -%}{%- set sorted.results = sorted.results + [t] -%}{%- endfor -%}{%- endfor -%}
        {%- set sorted.results = sorted.results if sorted.results | length == run.results | length else run.results -%}
        {%- for t in sorted.results -%}
          {{- "<tool_result>" + (t.content or "") + "</tool_result>" -}}{{- "\n\n" if not loop.last -}}
        {%- endfor -%}
      {%- endif -%}
    {%- endif -%}
  {%- elif m.role == "assistant" -%}
    {%- set state.ids = m.tool_calls | map(attribute="id") | list if m.tool_calls else [] -%}
    {%- if reasons -%}{{- (m.reasoning_content or "") + END_THINK -}}{%- endif -%}
    {{- m.content or "" -}}
    {%- if m.tool_calls -%}
      {{- "\n\n" + CALLS_OPEN + "\n" -}}
      {%- for c in m.tool_calls -%}
        {%- set f = c.function if c.function is defined else c -%}
        {%- if f.arguments is string -%}{{- raise_exception("Give the arguments of tool calls as objects, not as text.") -}}{%- endif -%}
        {{- '<｜DSML｜invoke name="' + f.name + '">\n' -}}
        {%- for name, value in f.arguments.items() -%}
          {{- '<｜DSML｜parameter name="' + name + '" string="' + ("true" if value is string else "false") + '">' + (value if value is string else value | tojson) + "</｜DSML｜parameter>\n" -}}
        {%- endfor -%}
        {{- "</｜DSML｜invoke>\n" -}}
      {%- endfor -%}
      {{- CALLS_CLOSE -}}
    {%- endif -%}
    {{- EOS -}}
  {%- else -%}
    {{- raise_exception("DeepSeek-V4 knows no role " + m.role) -}}
  {%- endif -%}
  {%- set opens = next.role in ["assistant", "latest_reminder"] or (not next.role and add_generation_prompt | default(true)) -%}
  {%- set dropped = m.role == "developer" and thinking and drop and i < turn.start -%}
  {%- if m.role in ["user", "tool", "developer"] and opens and not dropped -%}
    {{- ASSISTANT + (THINK if reasons else END_THINK) -}}
  {%- endif -%}
{%- endfor -%}
"""
