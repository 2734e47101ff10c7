"""How conversations become text and tokens for one tokenizer: its chat template, its arguments, its way of thinking.

Templates of thinking models differ in two ways that matter to training and to chat alike:

    switch       an argument (`enable_thinking`, `thinking`) that opens or closes thinking in the generation prompt
    reasoning    whether the last answer's reasoning is shown (FIELD), or is never shown because the generation prompt
                 has opened it already (OPENED), or is unknown to the template (UNKNOWN)

Both are found by rendering a conversation of two words, so no template is known by name. Where the template doesn't
know reasoning, a `<think>` block that stood inside the text of a message stays there as text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from mlx_lora.config import Data
from mlx_lora.errors import MlxLoraError
from mlx_lora.models import chat_templates
from mlx_lora.models.template import Job, Texts, View, render, submit

Message = Mapping[str, Any]
Messages = Sequence[Message]
Reasoning = Literal["field", "opened", "unknown"]
# Words that no template writes by itself.
_QUESTION, _ANSWER, _THOUGHT = "Qprobe", "Aprobe", "Tprobe"
THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class ToolForm:
    """How a template wants tool calls: `content` beside them empty or None, their arguments as an object or as JSON."""

    content: str | None = ""
    as_json: bool = False


FORMS = (ToolForm(), ToolForm(as_json=True), ToolForm(None), ToolForm(None, as_json=True))


@dataclass(frozen=True)
class ChatFormat:
    """The chats of one tokenizer. `template` None is the tokenizer's own; `arguments` go to every rendering.

    `own_end` is the token that ends an answer in a template that isn't the tokenizer's own.
    """

    tokenizer: Any
    template: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    own_end: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, settings: Data) -> ChatFormat:
        """The chats that data settings ask for. Raises MlxLoraError for a template that can't be read."""
        if settings.template in ("auto", "chat", "none"):
            return cls(tokenizer, arguments=settings.template_args)
        text, end = chat_templates.find(settings.template, tokenizer)
        return cls(tokenizer, text, settings.template_args, end)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        own = () if self.own_end is None else (self.own_end,)
        return frozenset(self.tokenizer.eos_token_ids).union(own)

    @property
    def end(self) -> int:
        """The token that ends an answer. Raises ValueError where there is none."""
        end = self.tokenizer.eos_token_id if self.own_end is None else self.own_end
        if end is None and not self.ends:
            raise ValueError("the tokenizer has no end token")
        return int(min(self.ends) if end is None else end)

    @property
    def available(self) -> bool:
        return self.template is not None or bool(self.tokenizer.has_chat_template)

    def view(self, count: int, *, prompt: bool, thinking: bool | None) -> View:
        """A view of the first `count` messages. `thinking` None leaves the switch as the tokenizer has it."""
        switch = {"enable_thinking": bool(self.tokenizer.has_thinking)}
        if thinking is not None:
            switch = {"enable_thinking": thinking, "thinking": thinking}
        return View(count, prompt, {**switch, **self.arguments})

    def job(self, messages: Messages, tools: Sequence[Any], views: Sequence[View]) -> Job:
        """A job for `messages` as this template wants them."""
        return Job([self._written(message) for message in messages], views, tools)

    def submit(self, jobs: Sequence[Job]) -> Callable[[], list[Texts]]:
        return submit(self.tokenizer, jobs, self.template)

    def texts(self, messages: Messages, tools: Sequence[Any], views: Sequence[View]) -> list[str]:
        """The texts of the views. Raises ValueError where the template refuses the conversation."""
        (texts,) = render(self.tokenizer, [self.job(messages, tools, views)], self.template)
        if isinstance(texts, ValueError):
            raise texts
        return texts

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids of each text; with `special` what the tokenizer adds to a text by itself, which templates write.

        A fast tokenizer encodes without holding the interpreter, so that other threads compute meanwhile.
        """
        if not texts:
            return []
        inner = getattr(self.tokenizer, "_tokenizer", self.tokenizer)
        backend = getattr(inner, "backend_tokenizer", None)
        if backend is None or backend.truncation or backend.padding:
            return list(inner(list(texts), add_special_tokens=special, return_attention_mask=False)["input_ids"])
        return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    @cached_property
    def think(self) -> tuple[str, str]:
        """What opens and what closes reasoning."""
        start, end = getattr(self.tokenizer, "think_start", None), getattr(self.tokenizer, "think_end", None)
        return (str(start), str(end)) if start and end else THINK

    @cached_property
    def reasoning(self) -> Reasoning:
        """What the template does with the reasoning of the last answer."""
        prompt, whole = self._probe(True)
        if _THOUGHT in whole:
            return "field"
        return "opened" if opens(prompt, self.think) else "unknown"

    @cached_property
    def header(self) -> str:
        """What the template writes in front of an answer, whether thinking is on or off: the prompt's part alone."""
        question: list[Message] = [{"role": "user", "content": _QUESTION}]
        views = [self.view(1, prompt=prompt, thinking=on) for on in (True, False) for prompt in (False, True)]
        (texts,) = render(self.tokenizer, [Job(question, views)], self.template)
        if isinstance(texts, ValueError):
            return ""
        on, off = (prompt.removeprefix(before) for before, prompt in (texts[:2], texts[2:]))
        header = on[
            : next((i for i, (a, b) in enumerate(zip(on, off, strict=False)) if a != b), min(len(on), len(off)))
        ]
        return header.partition(self.think[0])[0]

    @cached_property
    def thinks(self) -> bool:
        """Whether the template knows thinking: it shows reasoning, opens it, or can be told not to."""
        return self.reasoning != "unknown" or self._probe(True)[0] != self._probe(False)[0]

    def _probe(self, thinking: bool) -> tuple[str, str]:
        """The generation prompt, and the whole, of one question and an answer with reasoning; empty where refused."""
        messages: list[Message] = [
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": _ANSWER, "reasoning_content": _THOUGHT},
        ]
        views = [self.view(1, prompt=True, thinking=thinking), self.view(2, prompt=False, thinking=thinking)]
        try:
            (texts,) = render(self.tokenizer, [Job(messages, views)], self.template)
        except MlxLoraError:  # the template takes too long: a real conversation will say so
            return "", ""
        return ("", "") if isinstance(texts, ValueError) else (texts[0], texts[1])

    @cached_property
    def tool_form(self) -> ToolForm:
        """The first of FORMS in which the template shows a tool call; the first of all where it shows none."""
        call = {"type": "function", "function": {"name": _ANSWER, "arguments": {_QUESTION: _THOUGHT}}}
        for form in FORMS:
            messages: list[Message] = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": form.content, "tool_calls": [_call(call, form)]},
            ]
            (texts,) = render(
                self.tokenizer, [Job(messages, [self.view(2, prompt=False, thinking=None)])], self.template
            )
            if not isinstance(texts, ValueError) and all(word in texts[0] for word in (_ANSWER, _THOUGHT)):
                return form
        return FORMS[0]

    def _written(self, message: Message) -> dict[str, Any]:
        """A message as the template gets it."""
        written = {key: value for key, value in message.items() if value is not None and key != "inline_reasoning"}
        thought = written.get("reasoning_content")
        if thought is not None and self.reasoning != "field":
            del written["reasoning_content"]
            if self.reasoning == "unknown" and message.get("inline_reasoning"):
                written["content"] = with_reasoning(thought, written.get("content", ""))
        if calls := written.get("tool_calls"):
            written["content"] = written.get("content") or self.tool_form.content
            written["tool_calls"] = [_call(call, self.tool_form) for call in calls]
        return written


def with_reasoning(thought: str, content: str, think: tuple[str, str] = THINK) -> str:
    """An answer with its reasoning in front, as models write it."""
    return f"{think[0]}\n{thought.strip()}\n{think[1]}\n\n{content}"


def opens(prompt: str, think: tuple[str, str]) -> bool:
    """Whether a generation prompt ends inside reasoning."""
    return prompt.rfind(think[0]) > prompt.rfind(think[1])


def _call(call: Any, form: ToolForm) -> Any:
    """A tool call with its arguments as the form wants them."""
    function = call.get("function")
    if not form.as_json or not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
