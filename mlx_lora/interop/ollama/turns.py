"""What a chat template writes around the messages of a conversation, found by rendering conversations.

Most chat templates write each turn between an opening and a closing text, and differ in where the system message goes.
These texts are read off a few renderings of words that no template writes, and then held against renderings of other
conversations. A template that differs anywhere has no `Turns`, and the reason is said: a wrong prompt is worse than
none. So no template is recognised by its name, and one that nobody has seen is served if it is of this shape.

    no_system  user_open U user_close  assistant_open A assistant_close  user_open U user_close  prompt

`system` says where the system message goes: "turn" (a turn of its own, wherever it stands), "top" (all of them at the
start), "first" or "last" (inside the first or the last user turn), or "none" (the template leaves it out). With "turn"
and "top", a system message takes the place of `no_system`, which may be a default system message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_lora.models.chat_format import ChatFormat

Message = Mapping[str, Any]
Messages = Sequence[Message]
_Q1, _A1, _Q2, _S1 = "Qprobeone", "Aprobeone", "Qprobetwo", "Sprobeone"


@dataclass(frozen=True)
class Thinking:
    """A model that thinks: its prompts with thinking on and off, and what opens and closes reasoning."""

    on: str
    off: str
    opens: str
    closes: str


@dataclass(frozen=True)
class Turns:
    """The texts around messages. `prompt` is what an answer follows. The start token isn't part of them."""

    user_open: str
    user_close: str
    assistant_open: str
    assistant_close: str
    prompt: str
    no_system: str = ""
    system: str = "none"
    system_open: str = ""
    system_close: str = ""
    thinking: Thinking | None = None

    def render(self, messages: Messages) -> str:
        """The prompt for the next answer. Of a conversation that ends with an answer, that answer goes on."""
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        asked = [index for index, message in enumerate(messages) if message["role"] == "user"]
        place = {"first": asked[:1], "last": asked[-1:]}.get(self.system, [])
        shown = self.system_open + system + self.system_close if system else ""
        parts = [shown if self.system == "top" and system else self.no_system if self._alone(messages) else ""]
        for index, message in enumerate(messages):
            role, content, last = message["role"], message["content"], index == len(messages) - 1
            if role == "system" and self.system == "turn":
                parts += [self.system_open, content, self.system_close]
            elif role == "user":
                parts += [self.user_open, shown if index in place else "", content, self.user_close]
            elif role == "assistant":
                parts += [self.assistant_open, content, "" if last else self.assistant_close]
        return "".join([*parts, "" if messages[-1]["role"] == "assistant" else self.prompt])

    def _alone(self, messages: Messages) -> bool:
        """Whether `no_system` is written: where no system message takes its place."""
        if self.system == "turn":
            return bool(messages[0]["role"] != "system")
        return self.system != "top" or all(message["role"] != "system" for message in messages)

    @property
    def family(self) -> str:
        """What this shape is usually called; "turns" where it has no name."""
        around = self.user_open + self.user_close
        return next((name for name, marker in FAMILIES.items() if marker in around), "turns")


# Which marker a family is known by; for people only.
FAMILIES = {
    "chatml": "<|im_start|>", "llama3": "<|start_header_id|>", "gemma": "<start_of_turn>", "mistral": "[INST]",
    "granite": "<|start_of_role|>", "deepseek": "<｜User｜>", "phi": "<|user|>", "alpaca": "### Instruction:",
}  # fmt: skip


def learn(chats: ChatFormat, *, thinking: bool | None = None, bos: str = "") -> Turns:
    """The turns of a chat template, with thinking on, off or (None) as the tokenizer has it.

    `bos` is left out at the start of every rendering: llama.cpp's tokenizer adds it. Raises ValueError, saying what is
    different, for a template that isn't of this shape.
    """
    probe = _Probe(chats, thinking, bos)
    turns = _with_system(probe, _user_and_assistant(probe))
    for messages in CONVERSATIONS:
        if (expected := probe.optional(messages)) is not None and turns.render(messages) != expected:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"it writes a conversation of {roles} in another way than its turns")
    if thinking is False or not chats.thinks:
        return turns
    found = _thinking(chats, turns, bos)
    known = thinking or found.on != found.off or chats.reasoning == "opened"
    return replace(turns, thinking=found) if known else turns


def _thinking(chats: ChatFormat, turns: Turns, bos: str) -> Thinking:
    """The prompts with thinking on and off. Raises ValueError where that changes more than the prompt."""
    question = [_message("user", _Q1)]
    before = replace(turns, prompt="").render(question)
    on, off = (_Probe(chats, wanted, bos)(question) for wanted in (True, False))
    if not (on.startswith(before) and off.startswith(before)):
        raise ValueError("it writes the question in another way where thinking is on or off")
    return Thinking(on[len(before) :], off[len(before) :], *chats.think)


class _Probe:
    """Renders conversations with one template; a conversation that it refuses is a ValueError."""

    def __init__(self, chats: ChatFormat, thinking: bool | None, bos: str) -> None:
        self.chats, self.thinking, self.bos = chats, thinking, bos

    def __call__(self, messages: Messages, *, prompt: bool = True) -> str:
        view = self.chats.view(len(messages), prompt=prompt, thinking=self.thinking)
        return self.chats.texts(messages, (), [view])[0].removeprefix(self.bos)

    def optional(self, messages: Messages, *, prompt: bool = True) -> str | None:
        """The rendering, or None where the template refuses the conversation."""
        try:
            return self(messages, prompt=prompt)
        except ValueError:
            return None

    def ends(self, text: str) -> tuple[str, str]:
        """The end of a rendering without a prompt, and without the end token that some templates add there."""
        return text, text.removesuffix(str(self.chats.tokenizer.eos_token))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _between(text: str, *words: str) -> list[str]:
    """The texts before, between and behind words, which must occur once each and in this order."""
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            raise ValueError("it leaves a message out, repeats it, or changes its text")
        parts.append(before)
    return [*parts, text]


def _user_and_assistant(probe: _Probe) -> Turns:
    question, answer, second = _message("user", _Q1), _message("assistant", _A1), _message("user", _Q2)
    head, behind = _between(probe([question]), _Q1)
    _, closing, opening, end = _between(probe([question, answer, second]), _Q1, _A1, _Q2)
    if end != behind:
        raise ValueError("it writes the second question in another way than the first")
    _, end = _between(probe([question], prompt=False), _Q1)
    alone = next((one for one in probe.ends(end) if behind.startswith(one) and closing.startswith(one)), "")
    assistant_close = _closing(probe, opening, alone, [question, answer, second])
    user_open = opening[len(assistant_close) :]
    if not head.endswith(user_open):
        raise ValueError("it writes the first question in another way than those behind it")
    return Turns(
        user_open,
        alone,
        closing[len(alone) :],
        assistant_close,
        behind[len(alone) :],
        head[: len(head) - len(user_open)],
    )


def _closing(probe: _Probe, opening: str, user_close: str, messages: Messages) -> str:
    """The part of the text between an answer and the next question that closes the answer."""
    question, answer, second = messages
    whole = probe.optional([question, answer], prompt=False)
    if whole is not None:
        *_, alone = _between(whole, _Q1, _A1)
        for end in probe.ends(alone):
            if opening.startswith(end):
                return end
    doubled = probe.optional([question, second])
    if doubled is not None:
        _, between, _ = _between(doubled, _Q1, _Q2)
        if between.startswith(user_close) and opening.endswith(between[len(user_close) :]):
            return opening[: len(opening) - len(between) + len(user_close)]
    raise ValueError("where an answer ends and the next question begins can't be told apart")


def _with_system(probe: _Probe, turns: Turns) -> Turns:
    system, question = _message("system", _S1), _message("user", _Q1)
    short = probe.optional([system, question])
    long = probe.optional([system, question, _message("assistant", _A1), _message("user", _Q2)])
    if short is None or long is None or _S1 not in short:
        return turns
    before, between, _ = _between(short, _S1, _Q1)
    if _A1 in long.partition(_S1)[0]:
        return _inside("last", turns, before, between)
    if not between.endswith(turns.user_open):
        return _inside("first", turns, before, between)
    close = between[: len(between) - len(turns.user_open)]
    own = replace(turns, system="turn", system_open=before, system_close=close)
    later = [question, _message("assistant", _A1), system, _message("user", _Q2)]
    top = replace(own, system="top")
    return top if probe.optional(later) == top.render(later) else own


def _inside(place: str, turns: Turns, before: str, between: str) -> Turns:
    """The turns with the texts around a system message inside a user turn."""
    outside = turns.no_system + turns.user_open
    if not before.startswith(outside):
        raise ValueError("it writes the question behind a system message in another way")
    return replace(turns, system=place, system_open=before[len(outside) :], system_close=between)


def _conversation(*contents: str, system: str | None = None) -> Messages:
    roles = ("user", "assistant")
    turns = [_message(roles[index % 2], content) for index, content in enumerate(contents)]
    return [*([_message("system", system)] if system else []), *turns]


# Held against what was learned; no content begins or ends with white space, which many templates strip.
CONVERSATIONS: tuple[Messages, ...] = (
    _conversation("Hello"),
    _conversation("One\n\ntwo: {{ braces }} and <b>marks</b>", system="Be brief.\nAnswer in French."),
    _conversation("Why?", "Because.", "Who says so?"),
    _conversation("Why?", "Because.\n\n1. It is.\n2. It was.", "Who?", "Me", "And \"you\"?", system="You are kind"),
    _conversation("a", "b", "c", "d", "e", "f", "é ß 漢字 🙂"),
    _conversation("x", "y", "z", system="{'json': true}"),
)  # fmt: skip
