"""A request on its way: what is submitted for it, and what its events mean to the client, streamed or not.

Both forms come from the same changes, so a stream joined is the object that isn't streamed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_lora.serve.openai import logprobs
from mlx_lora.serve.openai.choice import Change, Choice
from mlx_lora.serve.openai.errors import api_error
from mlx_lora.serve.requests import Event, Failed, Finished, Request

Kind = Literal["chat", "completion"]
OBJECTS = {
    ("chat", True): "chat.completion.chunk", ("chat", False): "chat.completion",
    ("completion", True): "text_completion", ("completion", False): "text_completion",
}  # fmt: skip


@dataclass
class Asked:
    """`requests` are the rows to submit, one for each choice; `choices` what becomes of them, in the same order.

    `stream` and `usage`: whether the client wants a stream, and the usage at its end. `per_prompt` rows share a prompt.
    """

    kind: Kind
    model: str
    fingerprint: str
    tokenizer: Any
    requests: list[Request]
    choices: list[Choice]
    stream: bool = False
    usage: bool = False
    per_prompt: int = 1
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.id or f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{secrets.token_hex(16)}"
        self._begun = [False] * len(self.requests)
        self._offsets = [0] * len(self.requests)

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return all(choice.finished is not None for choice in self.choices)

    def wants_cancel(self, index: int) -> bool:
        """Whether a row that still runs has said enough: after a stop string, or the only call that may come."""
        return self.choices[index].enough and self.choices[index].finished is None

    def event(self, index: int, event: Event) -> list[dict[str, Any]]:
        """The chunks to stream after an event of row `index`. Raises ApiError where the row has failed."""
        if isinstance(event, Failed):
            raise api_error(event.error) from event.error
        choice = self.choices[index]
        if choice.finished is not None:
            return []
        changes = choice.take(event)
        chunks = [] if self._begun[index] or self.kind != "chat" else [self._first(index)]
        self._begun[index] = True
        chunks += [self._chunk(index, change) for change in changes]
        if isinstance(event, Finished):
            chunks.append(self._chunk(index, Change({}, []), choice.finish_reason))
            if self.done and self.usage:
                chunks.append({**self._frame(True), "choices": [], "usage": self._usage()})
        return chunks

    def whole(self) -> dict[str, Any]:
        """The object that a client gets who asked for no stream, once `done`."""
        choices = [self._whole(index, choice) for index, choice in enumerate(self.choices)]
        return {**self._frame(False), "choices": choices, "usage": self._usage()}

    def _frame(self, streamed: bool) -> dict[str, Any]:
        return {
            "id": self.id, "object": OBJECTS[self.kind, streamed], "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint,
        }  # fmt: skip

    def _first(self, index: int) -> dict[str, Any]:
        return self._chunk(index, Change({"role": "assistant", "content": ""}, []))

    def _chunk(self, index: int, change: Change, reason: str | None = None) -> dict[str, Any]:
        asked = self.requests[index].logprobs is not None and change.tokens
        told = self._logprobs(index, change.tokens) if asked else None
        choice: dict[str, Any] = {"index": index, "logprobs": told, "finish_reason": reason}
        if self.kind == "chat":
            choice["delta"] = change.delta
        else:
            choice["text"] = change.delta.get("content", "")
        nothing = {"usage": None} if self.usage else {}
        return {**self._frame(True), "choices": [choice], **nothing}

    def _logprobs(self, index: int, tokens: Sequence[Any]) -> dict[str, Any]:
        if self.kind == "chat":
            return logprobs.of_chat(self.tokenizer, tokens)
        told = logprobs.of_completion(self.tokenizer, tokens, self._offsets[index])
        self._offsets[index] += sum(map(len, told["tokens"]))
        return told

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        self._offsets[index] = 0
        told = self._logprobs(index, choice.shown_tokens) if self.requests[index].logprobs is not None else None
        whole: dict[str, Any] = {"index": index, "logprobs": told, "finish_reason": choice.finish_reason}
        if self.kind == "chat":
            return {**whole, "message": choice.message()}
        return {**whole, "text": "".join(choice.content)}

    def _usage(self) -> dict[str, Any]:
        """Tokens of prompts, each counted once, and of all answers."""
        firsts = [choice.finished for choice in self.choices[:: self.per_prompt]]
        prompt = sum(one.prompt_tokens for one in firsts if one)
        cached = sum(one.cached_tokens for one in firsts if one)
        made = sum(choice.tokens for choice in self.choices)
        thought = sum(choice.reasoning_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }  # fmt: skip
