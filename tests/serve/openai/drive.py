"""A request through its translator and a scheduler, as a server would do it, without one."""

from __future__ import annotations

import queue
from typing import Any

from mlx_lora.serve.openai import Asked, prepare
from mlx_lora.serve.openai.asked import Kind
from mlx_lora.serve.requests import Event, Finished, Token
from mlx_lora.serve.service import Service

HELLO = [{"role": "user", "content": "hello"}]
# A template that shows tools and reads calls of them as Hermes and Qwen write them.
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}"
    '<tool_call>\n{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking %}<think>\n{% endif %}{% endif %}"
)


def tool(name: str = "add", **parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": [*parameters], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def run(service: Service, body: dict[str, Any], kind: Kind = "chat") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chunks of a stream, and the whole object, of one and the same answer."""
    return follow(service, prepare(service, {"model": service.base, "messages": HELLO} | body, kind))


def complete(service: Service, **body: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return follow(service, prepare(service, {"model": service.base} | body, "completion"))


def follow(service: Service, asked: Asked) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    answers = [
        service.scheduler.submit(request, lambda event, index=index: events.put((index, event)))  # type: ignore[misc]
        for index, request in enumerate(asked.requests)
    ]
    chunks: list[dict[str, Any]] = []
    while not asked.done:
        index, event = events.get(timeout=60)
        chunks += asked.event(index, event)
        if asked.wants_cancel(index):
            answers[index].cancel()
    return chunks, asked.whole()


def feed(service: Service, asked: Asked, text: str, *, reason: str = "stop", index: int = 0) -> list[dict[str, Any]]:
    """The chunks of an answer that says `text`, which no model has to say."""
    tokens = service.tokenizer.encode(text, add_special_tokens=False)
    chunks = []
    for token in tokens:
        chunks += asked.event(index, Token(token, -0.5, ((token, -0.5), (1, -2.0))))
        if asked.wants_cancel(index):
            reason = "cancelled"
            break
    return chunks + asked.event(index, Finished(reason, len(asked.requests[index].tokens), 3, len(tokens)))


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The choice that the chunks of a chat add up to."""
    message: dict[str, Any] = {}
    logprobs: list[Any] = []
    reason = None
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            for key, value in choice["delta"].items():
                empty: Any = [] if isinstance(value, list) else ""
                message[key] = value if key == "role" else message.get(key, empty) + value
            logprobs += (choice["logprobs"] or {}).get("content", [])
            reason = choice["finish_reason"] or reason
    return {"message": message, "logprobs": logprobs, "finish_reason": reason}
