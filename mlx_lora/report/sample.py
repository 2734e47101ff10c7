"""A question with the wanted answer and what was answered: as lines for a terminal, and as part of a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_lora.report import page

SHOWN = 200  # characters of a text in a terminal, at most
CUT = "…"


@dataclass(frozen=True)
class Sample:
    """A prompt without what all prompts share, the wanted answer, and what each adapter (None: the base) answered.

    An answer that was cut, by its number of tokens or by time, ends with an ellipsis. `row` is its number in the file,
    from 0, where that is known; a page counts from 1, as `verdict` does on the screen.
    """

    prompt: str
    wanted: str
    answers: Mapping[str | None, str]
    row: int | None = None

    def right(self, name: str | None) -> bool:
        return self.answers[name].strip() == self.wanted.strip()

    def right_so_far(self, name: str | None) -> bool:
        """Whether an answer is the beginning of the wanted one, and was cut there: how it goes on isn't known."""
        answer = self.answers[name].removesuffix(CUT).rstrip("\ufffd").strip()  # half a character at the end
        return bool(answer) and self.answers[name].endswith(CUT) and self.wanted.strip().startswith(answer)

    def lines(self) -> list[str]:
        """A line for each text; an answer that is the wanted one isn't said twice."""
        texts = [("asked", _short(self.prompt, end=True)), ("wanted", _short(self.wanted))]
        for name, answer in self.answers.items():
            label = "answer" if len(self.answers) == 1 else name or "base"
            same = "the same" if self.right(name) else "the same, until it was cut" if self.right_so_far(name) else ""
            texts.append((label, same or _short(answer)))
        return [f"  {label:7} {text}" for label, text in texts]

    def html(self) -> str:
        """Base and adapters beneath each other, right or not: said in words, and by colour."""
        parts = [("asked", self.prompt, ""), ("wanted", self.wanted, "")]
        for name, answer in self.answers.items():
            said, kind = ("as wanted", "good") if self.right(name) else ("different", "bad")
            if kind == "bad" and self.right_so_far(name):
                said, kind = "as wanted until it was cut", ""
            parts.append((f"{name or 'base'}: {said}", answer, kind))
        return page.sample(parts, f"row {self.row + 1}" if self.row is not None else "")


def _short(text: str, *, end: bool = False) -> str:
    """One line of at most SHOWN characters: the first ones, or the last with `end`."""
    flat = " ".join(text.split())
    if len(flat) <= SHOWN:
        return flat
    return f"{CUT}{flat[1 - SHOWN :]}" if end else f"{flat[: SHOWN - 1]}{CUT}"
