"""An Ollama Modelfile: its instructions, quoted as Ollama reads them, and what a model is asked with.

Ollama's reader looks at what it has read of a value at every white space: a value that begins with three quotation
marks ends at the next three. So a text with three of them in a row can't be said. Characters that Go doesn't count as
printable (such as a no-break space) are dropped by it without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.errors import AdapterError
from mlx_lora.interop.ollama.turns import Turns

NAME = "Modelfile"
# Ollama's parameters by the names that generation_config.json has for them.
PARAMETERS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
# Ollama's own context where a Modelfile names none; more costs memory for every model that is loaded.
LEAST_CONTEXT = 4096
_KEPT = "\n\t\r"


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says. `model` is a file or a name of Ollama's; `template` None leaves Ollama to its own."""

    model: str
    adapter: str | None = None
    template: str | None = None
    system: str | None = None
    stops: Sequence[str] = ()
    parameters: Mapping[str, float | int] = field(default_factory=dict)
    comments: Sequence[str] = ()

    def text(self) -> str:
        """The file's text. Raises AdapterError for a text that a Modelfile can't hold."""
        lines = [f"# {' '.join(comment.split())}" for comment in self.comments]
        lines.append(f"FROM {self.model}")
        if self.adapter is not None:
            lines.append(f"ADAPTER {self.adapter}")
        if self.template is not None:
            lines.append(f"TEMPLATE {quoted(self.template, 'the template')}")
        if self.system:
            lines.append(f"SYSTEM {quoted(self.system, 'the system message')}")
        lines += [f"PARAMETER {name} {value!r}" for name, value in self.parameters.items()]
        lines += [f"PARAMETER stop {quoted(stop, 'a stop word')}" for stop in self.stops]
        return "\n".join(lines) + "\n"


def quoted(text: str, what: str) -> str:
    """A value between three quotation marks. Raises AdapterError for a text that has three of them in a row."""
    if '"""' in text:
        raise AdapterError(
            f"{what} has three quotation marks in a row, which end a text in Ollama's Modelfile",
            hint="train with a data.system that has none, or write the Modelfile by hand",
        )
    return f'"""{text}"""'


def dropped(text: str) -> list[str]:
    """The characters of a text that Ollama drops when it reads a Modelfile, as U+00A0."""
    lost = {character for character in text if not (character.isprintable() or character in _KEPT)}
    return [f"U+{ord(character):04X}" for character in sorted(lost)]


def stop_words(turns: Turns, special: Sequence[str]) -> list[str]:
    """Texts at which an answer ends: the markers of turns, and the line that a next question would begin with.

    `special` are the tokenizer's special tokens, which a template's markers usually are.
    """
    around = [turns.assistant_close, turns.user_open, turns.user_close, turns.assistant_open, turns.system_open]
    found = {token: min(text.find(token) for text in around if token in text) for token in special
             if len(token.strip()) > 1 and any(token in text for text in around)}  # fmt: skip
    markers = [token for token in found if not any(token != other and token in other for other in found)]
    line = turns.user_open.strip()
    begins = "\n" if turns.assistant_close.endswith("\n") else ""
    plain = [begins + line] if line and not any(marker in line for marker in markers) else []
    return [*sorted(markers, key=special.index), *plain]


def parameters(generation: Mapping[str, Any], context: int | None, trained_length: int | None) -> dict[str, Any]:
    """Sampling as the base's generation_config.json has it, and a context that the training rows fit into.

    `context` is the model's positions, `trained_length` the longest row that it learned from.
    """
    sampling = {
        own: generation[theirs]
        for theirs, own in PARAMETERS.items()
        if isinstance(value := generation.get(theirs), int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }
    wanted = max(LEAST_CONTEXT, trained_length or 0)
    return sampling | {"num_ctx": min(wanted, context) if context else wanted}
