"""Turns in the template language of Go, as Ollama's TEMPLATE takes it.

Ollama gives a template `.Messages` (role and content of each; messages of one role that follow one another are one),
and `.System`, the text of all system messages, which are in `.Messages` too: a template prints one of the two. White
space between actions is trimmed only where nothing but an action stands on either side, so every text is written as it
is.
"""

from __future__ import annotations

import re

from mlx_lora.interop.ollama.turns import Thinking, Turns

# What Go or Ollama's Modelfile may take for something else: braces, since two of them begin an action, also where one
# ends a text and the other begins the action behind it; and the end of a quotation.
_SPECIAL = re.compile(r'\{+|"{3,}')
_KEPT = "\n\t\r"
_LAST = "{{- $last := eq (len (slice $.Messages $i)) 1 }}"
# For an adapter that learned without a chat template: the last question alone, behind the system text.
PLAIN = (
    "{{- range $i, $_ := .Messages }}\n"
    f"{_LAST}\n"
    "{{- if $last }}{{ if $.System }}{{ $.System }}\n\n{{ end }}{{ .Content }}{{ end }}\n"
    "{{- end }}"
)


def go_template(turns: Turns) -> str:
    """The template that renders what `turns.render` does."""
    lines, alone = [], _literal(turns.no_system)
    if turns.system == "top":
        shown = _literal(turns.system_open) + "{{ .System }}" + _literal(turns.system_close)
        lines.append(f"{{{{- if .System }}}}{shown}{f'{{{{ else }}}}{alone}' if alone else ''}{{{{ end }}}}")
    elif alone and turns.system != "turn":
        lines.append(f"{{{{- if true }}}}{alone}{{{{ end }}}}")  # ends in an action, so that its own end isn't trimmed
    if turns.system == "first":
        lines.append("{{- $first := true }}")
    lines += ["{{- range $i, $_ := .Messages }}", _LAST]
    if alone and turns.system == "turn":
        lines.append(f'{{{{- if and (eq $i 0) (ne .Role "system") }}}}{alone}{{{{ end }}}}')
    lines += [
        _branches(turns),
        f'{{{{- if and $last (ne .Role "assistant") }}}}{_prompt(turns)}{{{{ end }}}}',
        "{{- end }}",
    ]
    return "\n".join(lines)


def _branches(turns: Turns) -> str:
    """What a message becomes, by its role."""
    system = f"{_literal(turns.system_open)}{{{{ $.System }}}}{_literal(turns.system_close)}"
    inside = {
        "first": f"{{{{ if and $first $.System }}}}{system}{{{{ end }}}}{{{{ $first = false }}}}",
        "last": f"{{{{ if and $last $.System }}}}{system}{{{{ end }}}}",
    }.get(turns.system, "")
    user = f"{_literal(turns.user_open)}{inside}{{{{ .Content }}}}{_literal(turns.user_close)}"
    answer = f"{_literal(turns.assistant_open)}{_thought(turns.thinking)}{{{{ .Content }}}}"
    close = f"{{{{ if not $last }}}}{_literal(turns.assistant_close)}{{{{ end }}}}"
    line = f'{{{{- if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{close}'
    if turns.system == "turn":
        own = f"{_literal(turns.system_open)}{{{{ .Content }}}}{_literal(turns.system_close)}"
        line += f'{{{{ else if eq .Role "system" }}}}{own}'
    return line + "{{ end }}"  # one line: a text may end in white space, which a trimmed action would take


def _prompt(turns: Turns) -> str:
    if turns.thinking is None:
        return _literal(turns.prompt)
    on, off = _literal(turns.thinking.on), _literal(turns.thinking.off)
    if turns.thinking.on == turns.prompt:
        return f"{{{{ if and $.IsThinkSet (not $.Think) }}}}{off}{{{{ else }}}}{on}{{{{ end }}}}"
    asked = f"{{{{ if $.Think }}}}{on}{{{{ else }}}}{off}{{{{ end }}}}"
    return f"{{{{ if $.IsThinkSet }}}}{asked}{{{{ else }}}}{_literal(turns.prompt)}{{{{ end }}}}"


def _thought(thinking: Thinking | None) -> str:
    """Reasoning of an answer that goes on; Ollama learns from it what opens and closes reasoning in an answer."""
    if thinking is None:
        return ""
    shown = f"{_literal(thinking.opens)}\n{{{{ .Thinking }}}}\n{_literal(thinking.closes)}\n\n"
    return f"{{{{ if and $last .Thinking }}}}{shown}{{{{ end }}}}"


def _literal(text: str) -> str:
    """`text` as a template writes it: what would be taken for something else is quoted as Go quotes it."""
    parts, at = [], 0
    for found in _SPECIAL.finditer(text):
        parts += [_printable(text[at : found.start()]), f"{{{{ {go_quoted(found.group())} }}}}"]
        at = found.end()
    return "".join([*parts, _printable(text[at:])])


def _printable(text: str) -> str:
    """A Modelfile loses characters that Go doesn't count as printable; quoted they stay."""
    return "".join(
        character if character.isprintable() or character in _KEPT else f"{{{{ {go_quoted(character)} }}}}"
        for character in text
    )


def go_quoted(text: str) -> str:
    """A string literal of Go in ASCII, without three quotation marks in a row."""
    escaped = (f"\\u{ord(c):04x}" if ord(c) < 1 << 16 else f"\\U{ord(c):08x}" for c in text)
    plain = "".join(c if c == "{" else e for c, e in zip(text, escaped, strict=True))
    return f'"{plain}"'
