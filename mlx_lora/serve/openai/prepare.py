"""A request's body becomes rows to submit: its prompt, its settings, its grammar, and what reads its answers.

    body ── read ──> fields ── messages, template ──> prompt ── settings, grammar ──> Request per choice ──> Asked

All of it is work for a processor, in the thread that calls; the generating thread gets what is ready.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from mlx_lora.errors import MlxLoraError
from mlx_lora.models import token_ids
from mlx_lora.models.tool_calls import ToolFormat, tool_format
from mlx_lora.serve.openai.asked import Asked, Kind
from mlx_lora.serve.openai.bodies import ChatBody, Common, CompletionBody, read
from mlx_lora.serve.openai.choice import Calls, Choice
from mlx_lora.serve.openai.constrained import Constrained, Gate
from mlx_lora.serve.openai.errors import ApiError, api_error, refused
from mlx_lora.serve.openai.grammar import Grammars
from mlx_lora.serve.openai.messages import prompt_messages
from mlx_lora.serve.openai.rules import Rules, rules
from mlx_lora.serve.openai.settings import penalties_of, sampling_of
from mlx_lora.serve.openai.split import Splitter
from mlx_lora.serve.openai.target import Target, find_model
from mlx_lora.serve.requests import Processor, Request
from mlx_lora.serve.service import Prompt, Service
from mlx_lora.serve.text import TextStream

# Tokens of an answer where the request doesn't say: OpenAI's chats have no limit, its completions have 16.
CHAT_TOKENS, COMPLETION_TOKENS = 4096, 16
# Prompts of one request to /v1/completions, and rows that it may become.
MOST_ROWS = 64
# What rendering a template is called with by the server alone.
OWN_ARGUMENTS = frozenset(
    "messages conversation tools documents chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)


def prepare(service: Service, body: Any, kind: Kind = "chat") -> Asked:
    """What `body`, a JSON value, asks of an endpoint. Raises ApiError."""
    try:
        return (
            _chat(service, read(ChatBody, body)) if kind == "chat" else _completion(service, read(CompletionBody, body))
        )
    except ApiError:
        raise
    except MlxLoraError as error:
        raise api_error(error) from error


def _chat(service: Service, body: ChatBody) -> Asked:
    target = find_model(service, body.model)
    form = _form(target, body)
    prompt = _prompt(target, body, form)
    opened = _ends_with(target, prompt, target.format.think[:1])
    calls = None
    if form is not None and body.tool_choice != "none":
        calls = Calls(form, body.shown_tools, body.parallel_tool_calls)
    found = rules(body, form, Grammars.of(service.tokenizer))
    constrained = None if found is None else _constrained(target, found, form, prompt, opened)

    def choice() -> Choice:
        marks = (calls.format.start, calls.format.end) if calls else None
        splitter = Splitter(target.format.think, marks, opened=opened)
        return Choice(TextStream(service.tokenizer, body.stop), splitter, calls)

    request = Request(
        prompt.tokens, target.adapter, logprobs=body.top, first_answer=prompt.first_answer,
        max_tokens=target.most_tokens(prompt, body.max_completion_tokens or body.max_tokens, CHAT_TOKENS),
    )  # fmt: skip
    rows = _rows(target, body, request, constrained)
    return Asked(
        "chat", body.model, target.fingerprint, service.tokenizer, rows, [choice() for _ in rows], body.stream,
        body.stream_options.include_usage, body.n,
    )  # fmt: skip


def _completion(service: Service, body: CompletionBody) -> Asked:
    target, rows = find_model(service, body.model), list[Request]()
    if (count := len(body.prompts) * body.n) > MOST_ROWS:
        raise refused("prompt", f"{count} answers are asked for, at most {MOST_ROWS} can be")
    for text in body.prompts:
        target.check_length("prompt", len(text) if isinstance(text, str) else 0)
    prompts = [service.raw(one) if isinstance(one, str) else Prompt(tuple(one)) for one in body.prompts]
    if not prompts or not all(prompt.tokens for prompt in prompts):
        raise refused("prompt", "the prompt is empty")
    for prompt in prompts:
        if min(prompt.tokens) < 0 or token_ids.fault(service.tokenizer, prompt.tokens):
            raise refused("prompt", "the prompt has a token that the model doesn't know")
        most = target.most_tokens(prompt, body.max_tokens, COMPLETION_TOKENS)
        rows += _rows(target, body, Request(prompt.tokens, target.adapter, most, logprobs=body.logprobs), None)
    choices = [Choice(TextStream(service.tokenizer, body.stop), Splitter()) for _ in rows]
    return Asked(
        "completion", body.model, target.fingerprint, service.tokenizer, rows, choices, body.stream,
        body.stream_options.include_usage, body.n,
    )  # fmt: skip


def _form(target: Target, body: ChatBody) -> ToolFormat | None:
    """How this model calls tools, None without tools. Raises ApiError where that isn't known."""
    if not body.tools:
        return None
    if target.trained.template == "none":
        raise refused("tools", "the model was trained without a chat template, which would show it the tools")
    form = tool_format(target.service.tokenizer, target.trained.chat_template)
    if form is None:
        raise refused("tools", "this model's chat template shows no tools, or its calls of them aren't known")
    return form


def _prompt(target: Target, body: ChatBody, form: ToolFormat | None) -> Prompt:
    """The prompt's tokens. Raises ApiError for tools that the template doesn't show."""
    if wrong := OWN_ARGUMENTS.intersection(body.chat_template_kwargs):
        raise refused("chat_template_kwargs", f"{sorted(wrong)[0]!r} isn't for requests to set")
    thinking, arguments = body.enable_thinking, dict(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        thinking = body.reasoning_effort not in ("none", "minimal") if thinking is None else thinking
        arguments.setdefault("reasoning_effort", body.reasoning_effort)
    messages = prompt_messages(body.messages, target.trained, developer="developer" in target.template)
    tools = body.shown_tools if body.tool_choice != "none" else []
    target.check_length("messages", len(json.dumps([body.messages, tools, arguments], ensure_ascii=False)))
    prompt = target.service.prompt(
        messages, target.adapter, thinking=thinking, tools=tools, template_args=arguments
    )  # fmt: skip
    if tools:
        text = target.service.tokenizer.decode(prompt.tokens)
        if missing := [tool.function.name for tool in body.tools if tool.function.name not in text]:
            raise refused("tools", f"this model's chat template doesn't show it the tool {missing[0]!r}")
    return prompt


def _ends_with(target: Target, prompt: Prompt, marks: tuple[str, ...]) -> bool:
    """Whether the template has written one of `marks` at the end of the prompt."""
    tail = target.service.tokenizer.decode(prompt.tokens[-64:])
    return target.trained.template != "none" and tail.rstrip().endswith(marks)


def _constrained(
    target: Target, found: Rules, form: ToolFormat | None, prompt: Prompt, opened: bool
) -> Constrained | None:
    """The processor of a grammar. Raises ApiError for one that is refused, unless it is optional."""
    start, end = map(target.tokens, target.format.think)
    may = not opened and target.format.thinks and not _ends_with(target, prompt, target.format.think)
    special = len(start) == 1 or start[0] in target.service.tokenizer.added_tokens_decoder
    gate = Gate(
        opened,
        (start if may and special else (), end),
        target.tokens(form.start) if form and found.triggered else (),
    )
    text = found.text(after_reasoning=bool(opened or gate.think[0]) and not found.triggered)
    try:
        matcher = Grammars.of(target.service.tokenizer).compiled(text, found.param)
    except ApiError:
        if found.optional:
            return None
        raise
    return Constrained(matcher, len(prompt.tokens), gate, target.format.ends)


def _rows(target: Target, body: Common, request: Request, constrained: Constrained | None) -> list[Request]:
    """A row for each choice. Each has its own seed, which follows from the request's, and its own processors."""
    rows = []
    for index in range(body.n):
        processors: list[Processor] = penalties_of(target, body, len(request.tokens))
        if constrained is not None:
            processors.append(constrained.copy())
        rows.append(replace(request, sampling=sampling_of(target, body, index), processors=tuple(processors)))
    return rows
