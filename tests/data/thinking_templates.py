"""Chat templates of the newer thinking kinds, written from their documented behaviour.

Opening: the generation prompt opens `<think>`, and only the last answer shows a block, empty where there is no
reasoning. Channel: the prompt has an empty thought channel where thinking is off, answers show none.
"""

OPENING = """{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{- '<|user|><tool_response>\n' + message.content + '\n</tool_response><|end|>\n' -}}
{%- else -%}
{{- '<|' + message.role + '|>' -}}
{%- if message.role == 'assistant' and loop.last -%}
{{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' -}}
{%- endif -%}
{{- message.content -}}
{%- for call in message.tool_calls or [] -%}
{{- '\n<tool_call>\n<function=' + call.function.name + '>\n' -}}
{%- for name, value in call.function.arguments.items() -%}
{{- '<parameter=' + name + '>\n' + (value if value is string else value | tojson) + '\n</parameter>\n' -}}
{%- endfor -%}
{{- '</function>\n</tool_call>' -}}
{%- endfor -%}
{{- '<|end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{{- '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '<think>\n' -}}
{%- endif -%}
"""

CHANNEL = """{%- for message in messages -%}
{{- '<|' + message.role + '|>' -}}
{%- if message.role == 'assistant' and message.reasoning_content and loop.last -%}
{{- '<|channel>thought\n' + message.reasoning_content + '\n<channel|>' -}}
{%- endif -%}
{{- message.content | trim -}}
{%- for call in message.tool_calls or [] -%}
{{- '<|tool_call>call:' + call.function.name + (call.function.arguments | tojson) + '<tool_call|>' -}}
{%- endfor -%}
{{- '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{{- '<|channel>thought\n<channel|>' if not enable_thinking else '' -}}
{%- endif -%}
"""
