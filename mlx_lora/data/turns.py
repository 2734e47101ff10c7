"""A conversation becomes rows in which every learned answer follows the very tokens that a chat would send.

For the answer of message i the prompt P is what the template makes of the messages before it, up to where the answer
begins. The whole W is what it makes of the messages up to i. The answer is what W adds to P:

    P   <|user|>2+2?<|end|><|assistant|>                          sent by chat, generate, eval and serve
    W   <|user|>2+2?<|end|><|assistant|>4<|end|>                  rendered with the answer
    row <|user|>2+2?<|end|><|assistant|>4<|end|>                  loss on `4<|end|>`

Where W doesn't begin with P, the generation prompt has opened or closed reasoning that W doesn't show. Then what
follows the answer's header in W is the answer, after the end of the reasoning where P is inside it.

Several answers share a row as long as each prompt begins with the tokens of the row so far. Templates that show an
earlier answer in another form than the last one (without its reasoning, for example) begin a new row there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlx_lora.data.example import Example, shorten
from mlx_lora.data.rows import common
from mlx_lora.data.shown import hidden
from mlx_lora.models.chat_format import ChatFormat, opens
from mlx_lora.models.template import Job, Texts, View

# Where an answer's text is looked for: at most this many places, by this many characters before each.
MOST_PLACES, TAIL = 50, 200

Tokens = list[int]
Weighted = tuple[Tokens, list[float]]


@dataclass(frozen=True)
class Turn:
    """An answer to learn: message `index`, asked with thinking on, off, or as the tokenizer has it (None)."""

    index: int
    thinking: bool | None


@dataclass
class Talk:
    """A conversation with its learned turns; without any it is learned as a whole, with thinking on, off or as it is.

    `texts` are P, and P with the answer, of each turn, once it is rendered; of a whole conversation its one text.
    `hidden` are the parts that the template leaves out.
    """

    example: Example
    turns: Sequence[Turn]
    thinking: bool | None = None
    texts: list[str] = field(default_factory=list)
    fault: str | None = None
    tools_shown: bool = True
    hidden: list[str] = field(default_factory=list)

    def job(self, chat: ChatFormat) -> Job:
        """The views that `take` wants: for each turn P, W, and where P hides reasoning the messages before it."""
        messages = self.example.messages
        views: list[View] = [] if self.turns else [chat.view(len(messages), prompt=False, thinking=self.thinking)]
        for turn in self.turns:
            views.append(chat.view(turn.index, prompt=True, thinking=turn.thinking))
            views.append(chat.view(turn.index + 1, prompt=False, thinking=turn.thinking))
            if chat.reasoning == "opened":
                views.append(chat.view(turn.index, prompt=False, thinking=turn.thinking))
        return chat.job(messages, self.example.tools, views)

    def take(self, chat: ChatFormat, texts: Texts) -> None:
        """Take the texts of `job`; what is wrong with them becomes `fault`."""
        try:
            if isinstance(texts, ValueError):
                raise refusal(texts)
            if not self.turns:
                self._check_shown(Turn(len(self.example.messages) - 1, None), texts[0])
                self.texts = texts
            for place, turn in enumerate(self.turns):
                size = len(texts) // len(self.turns)
                prompt, whole, *before = texts[place * size : (place + 1) * size]
                answer = self._answer(chat, turn, prompt, whole, *before)
                self._check_shown(turn, prompt + answer)
                self.texts += [prompt, prompt + answer]
        except ValueError as error:
            self.fault, self.texts = str(error), []

    def _answer(self, chat: ChatFormat, turn: Turn, prompt: str, whole: str, before: str | None = None) -> str:
        """What follows the prompt when the model answers as message `turn.index` does."""
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        message = self.example.messages[turn.index]
        if before is None:
            view = chat.view(turn.index, prompt=False, thinking=turn.thinking)
            (before,) = chat.texts(self.example.messages[: turn.index], self.example.tools, [view])
        body = _after_header(chat.header, str(message.get("content") or "").strip(), prompt, whole, before)
        if body is None:
            self._check_shown(turn, whole)  # names what is missing
            raise ValueError(
                f"the chat template writes message {turn.index + 1} in a way that doesn't show where the answer "
                "begins; data.mask=all learns the conversation as a whole"
            )
        start, end = map(re.escape, chat.think)
        if not opens(prompt, chat.think):  # a prompt that has closed thinking is followed by the answer alone
            closed = re.search(rf"{end}\s*$", prompt) and re.match(rf"\s*{start}.*?{end}\s*", body, re.DOTALL)
            return body[closed.end() :] if closed else body
        if empty := re.match(rf"\s*(?:{start})?\s*{end}\s*", body):
            body = body[empty.end() :]
        thought = str(message.get("reasoning_content") or "").strip()
        return f"{'' if prompt.endswith(chr(10)) else chr(10)}{thought}\n{chat.think[1]}\n\n{body}"

    def _check_shown(self, turn: Turn, text: str) -> None:
        """Raise ValueError, naming them, for parts of the conversation that the template leaves out.

        Definitions of tools that it leaves out are only noted: calls can be learned without them.
        """
        messages = self.example.messages[: turn.index + 1]
        missing = hidden(messages, self.example.tools, text, learned=turn.index)
        self.tools_shown = self.tools_shown and all(part.kind != "tools" for part in missing)
        parts = list(dict.fromkeys((part.number, part.kind) for part in missing if part.kind != "tools"))
        self.hidden += [f"{kind} of message {number + 1}" for number, kind in parts]
        if not parts:
            return
        shown = ", ".join(f"{kind} of message {number + 1}" for number, kind in parts[:3])
        agreed = sorted({kind for _, kind in parts if kind != "content"})
        why = ""
        if "reasoning_content" in agreed and turn.thinking is False:
            why = ", with thinking off"
        hint = (
            f"; data.drop=[{', '.join(agreed)}] trains without it" if len(agreed) == len({k for _, k in parts}) else ""
        )
        raise ValueError(f"the chat template doesn't show {shown}{' …' if len(parts) > 3 else ''}{why}{hint}")


def refusal(error: ValueError) -> ValueError:
    """A template's own error, without private text."""
    return ValueError(f"the chat template refuses this conversation: {shorten(str(error))}")


def _after_header(header: str, content: str, prompt: str, whole: str, before: str) -> str | None:
    """What follows the last message's header in `whole`, or None where it can't be told.

    Where the history reads differently in the whole, the message's text is looked for: of the last few places where it
    stands, the one behind what is most like the end of the prompt.
    """
    if whole.startswith(before + header) and prompt.startswith(before + header):
        return whole[len(before) + len(header) :]
    if whole.startswith(before) and not content:  # some write a second tool call without a header
        return whole[len(before) :]
    places = [match.start() for match in re.finditer(re.escape(content), whole)][-MOST_PLACES:] if content else []
    if not places:
        return None

    def likeness(place: int) -> tuple[int, int]:
        return common(whole[max(place - TAIL, 0) : place][::-1], prompt[-TAIL:][::-1]), place

    return whole[max(places, key=likeness) :]


def join(
    tokens: Sequence[Tokens],
    texts: Sequence[str],
    continued: Callable[[str], Tokens],
    close: Callable[[Tokens], Tokens],
) -> list[Weighted]:
    """Rows of the tokens and texts of P, and P with the answer, of each turn.

    An answer whose tokens merge with its prompt's is encoded by itself (`continued`): generation sees the prompt's own
    tokens. `close` ends an answer.
    """
    rows: list[Weighted] = []
    row: Tokens = []
    weights: list[float] = []
    for place in range(0, len(tokens), 2):
        prompt, whole = tokens[place : place + 2]
        same = whole[: len(prompt)] == prompt
        answer = close(whole[len(prompt) :] if same else continued(texts[place + 1][len(texts[place]) :]))
        if row and prompt[: len(row)] != row:
            rows.append((row, weights))
            row, weights = [], []
        weights += [0.0] * (len(prompt) - len(row)) + [1.0] * len(answer)
        row = prompt + answer
    return [*rows, (row, weights)] if row else rows
