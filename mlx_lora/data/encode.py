"""Examples become rows of token ids with loss weights: masks, the end token, truncation.

Conversations go through the chat template (`turns.py` says how prompts and answers are told apart), everything else is
encoded as it stands. Many examples are rendered and encoded at a time, and the next ones are rendered meanwhile, so
that workers and this process compute side by side.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from mlx_lora.config import Data
from mlx_lora.data.ends import Ends
from mlx_lora.data.example import Example
from mlx_lora.data.shown import dropped
from mlx_lora.data.turns import Talk, Tokens, Turn, Weighted, join, refusal
from mlx_lora.models import template, token_ids
from mlx_lora.models.chat_format import ChatFormat, Messages
from mlx_lora.models.template import Texts

# Examples that are rendered and encoded together.
BATCH, BATCH_CHARACTERS = 64, 1 << 20
# Threads that encode; a tokenizer doesn't hold the interpreter while it does.
MOST_THREADS = 4


Thinking = bool | None


@dataclass
class Encoded:
    """One example on its way to rows: a conversation, or texts that are encoded as they stand.

    `fault` says why it gives no rows. The rows of a conversation are one, or several where its template shows earlier
    answers in another form than the last one.
    """

    example: Example
    talk: Talk | None = None
    texts: list[str] = field(default_factory=list)
    rows: list[Weighted] = field(default_factory=list)
    fault: str | None = None


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the data settings that decide tokens and masks; `format` where it isn't the tokenizer's own."""

    tokenizer: Any
    settings: Data
    format: ChatFormat | None = None

    @cached_property
    def chat(self) -> ChatFormat:
        """How conversations become text."""
        return self.format or ChatFormat.of(self.tokenizer, self.settings)

    @cached_property
    def ends(self) -> Ends:
        """Where answers end."""
        return Ends(self.chat)

    def encoded(self, examples: Iterable[Example]) -> Iterator[Encoded]:
        """Each example with its rows or its `fault`, in order. Raises ModelError where the template itself fails.

        Batches pass through three stages at a time: workers render the next ones, threads encode some, and rows are
        made of the one before them.
        """
        source = iter(examples)
        rendering: deque[tuple[list[Encoded], Callable[[], list[Texts]]]] = deque()
        encoding: deque[tuple[list[Encoded], Future[list[Tokens]]]] = deque()
        count = min(os.cpu_count() or 1, MOST_THREADS)
        with ThreadPoolExecutor(count, thread_name_prefix="encoding") as threads:
            while batch := self._batch(source):
                jobs = [one.talk.job(self.chat) for one in batch if one.talk]
                rendering.append((batch, self.chat.submit(jobs) if jobs else list))
                if len(rendering) > template.workers():
                    encoding.append(self._rendered(threads, *rendering.popleft()))
                if len(encoding) > count:
                    yield from self._finished(*encoding.popleft())
            while rendering or encoding:
                if rendering:
                    encoding.append(self._rendered(threads, *rendering.popleft()))
                yield from self._finished(*encoding.popleft())

    def rows(self, example: Example) -> list[Weighted]:
        """Token ids and loss weights of a whole example, before its length is looked at.

        Raises ValueError naming what can't be encoded, or a token that the model's embedding has no row for.
        """
        (one,) = self.encoded([example])
        if one.fault:
            raise ValueError(one.fault)
        return one.rows

    def prompt_tokens(
        self, example: Example, *, thinking: bool | None | Literal["as learned"] = "as learned"
    ) -> Tokens:
        """The tokens that generation starts from: everything before the last answer that is learned.

        Raises ValueError for plain text, and for a token that the model's embedding has no row for.
        """
        if example.text is not None:
            raise ValueError("plain text has no prompt to answer")
        if not self.templated(example):
            assert example.plain is not None
            return self._embedded(self.ends.without(self.tokenizer.encode(example.plain[0])))
        example = self._kept(example)
        answer = example.messages[example.prompt_messages] if example.prompt_messages < len(example.messages) else None
        thinking = self._thinking(answer) if thinking == "as learned" else thinking
        return self.prompt(example.messages[: example.prompt_messages], example.tools, thinking=thinking)

    def prompt(self, messages: Messages, tools: Sequence[Any] = (), *, thinking: bool | None = None) -> Tokens:
        """The tokens that an answer to `messages` starts from, as rows have them before their answers.

        Raises ValueError where the template refuses them, or for a token that the embedding has no row for.
        """
        view = self.chat.view(len(messages), prompt=True, thinking=thinking)
        try:
            (text,) = self.chat.texts(messages, tools, [view])
        except ValueError as error:
            raise refusal(error) from None
        return self._embedded(self.chat.encode([text])[0])

    def templated(self, example: Example) -> bool:
        """Whether an example goes through the chat template."""
        if self.settings.template == "none":
            if example.plain is None:
                raise ValueError("template none needs text, or one prompt and one completion")
            return False
        if not self.chat.available and (self.settings.template == "chat" or example.plain is None):
            raise ValueError("the tokenizer has no chat template; data.template=chatml gives it one")
        return self.chat.available

    def _batch(self, source: Iterator[Example]) -> list[Encoded]:
        """The next examples: fewer where they are long, for each answer of a conversation has its whole history."""
        batch: list[Encoded] = []
        size = 0
        while len(batch) < BATCH and size < BATCH_CHARACTERS and (example := next(source, None)) is not None:
            one = self._begun(example)
            batch.append(one)
            texts = one.texts or [str(message.get("content") or "") for message in example.messages]
            size += sum(map(len, texts)) * max(len(one.talk.turns) if one.talk else 1, 1)
        return batch

    def _begun(self, example: Example) -> Encoded:
        """An example with its turns found, or with the texts to encode."""
        one = Encoded(example)
        try:
            if example.text is not None:
                if self.settings.template not in ("auto", "none"):
                    raise ValueError(f"template {self.settings.template} needs messages, the row is plain text")
                if self.settings.mask not in ("auto", "all"):
                    raise ValueError(f"mask {self.settings.mask} needs an answer, the row is plain text")
                one.texts = [example.text]
            elif self.templated(example):
                kept = self._kept(example)
                self._refuse_ends(kept)
                one.talk = self._talk(kept)
            else:
                assert example.plain is not None
                one.texts = [example.plain[0], "".join(example.plain)]
        except ValueError as error:
            one.fault = str(error)
        return one

    def _rendered(
        self, threads: ThreadPoolExecutor, batch: list[Encoded], result: Callable[[], list[Texts]]
    ) -> tuple[list[Encoded], Future[list[Tokens]]]:
        """The batch once it is rendered, and the tokens of all its texts to come, those of conversations first."""
        rendered = iter(result())
        for one in batch:
            if one.talk:
                one.talk.take(self.chat, next(rendered))
                one.fault, one.texts = one.talk.fault, one.talk.texts
        chats = [text for one in batch if one.talk for text in one.texts]
        plain = [text for one in batch if not one.talk for text in one.texts]
        return batch, threads.submit(lambda: self.chat.encode(chats) + self.chat.encode(plain, special=True))

    def _finished(self, batch: list[Encoded], tokens: Future[list[Tokens]]) -> Iterator[Encoded]:
        """The batch with its rows."""
        found = tokens.result()
        chats, plain = iter(found), iter(found[sum(len(one.texts) for one in batch if one.talk) :])
        for one in batch:
            of_texts = list(islice(chats if one.talk else plain, len(one.texts)))
            if not one.fault:
                try:
                    one.rows = self._weighted(one, of_texts)
                    for row, _ in one.rows:
                        self._embedded(row)
                except ValueError as error:
                    one.fault = str(error)
            yield one

    def _weighted(self, one: Encoded, tokens: list[Tokens]) -> list[Weighted]:
        if one.talk and one.talk.turns:
            return join(tokens, one.talk.texts, self.ends.continuation, self.ends.closed)
        if one.talk:
            last_is_answer = one.example.messages[-1]["role"] == "assistant"
            return [_from(self.ends.closed(tokens[0]) if last_is_answer else tokens[0], 1)]
        if one.example.text is not None:
            return [_from(self.ends.ended(tokens[0]), 1)]
        prompt, whole = map(self.ends.without, tokens)
        if whole[: len(prompt)] != prompt:  # the join merges into one token: generation will see the prompt's own
            whole = prompt + self.ends.continuation(one.texts[1][len(one.texts[0]) :])
        return [_from(self.ends.ended(whole), 1 if self.settings.mask == "all" else max(len(prompt), 1))]

    def _kept(self, example: Example) -> Example:
        """The example without the parts that the settings drop."""
        drop = self.settings.drop
        if not drop or example.text is not None:
            return example
        before = dropped(example.messages[: example.prompt_messages], drop)
        after = dropped(example.messages[example.prompt_messages :], drop)
        if not any(message["role"] == "assistant" for message in (*before, *after)):
            raise ValueError(f"no answer is left without {', '.join(drop)}")
        tools = () if "tools" in drop else example.tools
        return Example(None, (*before, *after), len(before), example.plain, tools, example.mask)

    def _talk(self, example: Example) -> Talk:
        """The conversation with the answers to learn, or all of it with the thinking of its last answer."""
        if self.settings.mask != "all":
            return Talk(example, self._turns(example))
        answers = [message for message in example.messages if message["role"] == "assistant"]
        return Talk(example, [], self._thinking(answers[-1] if answers else None))

    def _turns(self, example: Example) -> list[Turn]:
        """The answers that carry loss."""
        turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        mask = example.mask if self.settings.mask == "auto" else self.settings.mask
        if mask == "completion":
            turns = [turn for turn in turns if turn >= example.prompt_messages]
        if mask == "last":
            turns = turns[-1:]
        return [Turn(turn, self._thinking(example.messages[turn])) for turn in turns]

    def _thinking(self, answer: dict[str, Any] | None) -> bool | None:
        """Whether the model is asked to think before this answer: with auto where the answer has reasoning."""
        if self.settings.thinking != "auto":
            return self.settings.thinking == "on"
        return None if answer is None else bool(answer.get("reasoning_content"))

    def _refuse_ends(self, example: Example) -> None:
        """A text that holds the end token would end its turn there, and be learned up to there only."""
        for index, message in enumerate(example.messages):
            for end in self.ends.texts:
                if end in str(message.get("content") or "") or end in str(message.get("reasoning_content") or ""):
                    raise ValueError(f"message {index + 1} holds the end token {end!r} inside its text")

    def _embedded(self, tokens: Tokens) -> Tokens:
        """`tokens`, each of which has a row in the model's embedding."""
        if found := token_ids.fault(self.tokenizer, tokens):
            raise ValueError(f"{found}: {token_ids.HINT}")
        return tokens


def _from(tokens: Tokens, start: int) -> Weighted:
    """Tokens that carry loss from `start` on."""
    return tokens, [0.0] * start + [1.0] * (len(tokens) - start)
