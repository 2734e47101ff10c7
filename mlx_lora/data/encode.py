"""Examples become token ids with a loss weight each: chat template, masks, truncation, the end token.

    tokens   <s> user: what is 2+2? \n assistant: 4 </s> \n          (as the template renders the whole)
    weights   0   0    0    0  0    0      0      1  1               (mask completion; nothing after the end is kept)

`weights[t]` belongs to predicting token t. The prompt is verified to be a token prefix of the whole: where a template
renders it differently once the answer follows, the row is a problem and not a wrong mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_lora.config import Data
from mlx_lora.data.example import Example, shorten
from mlx_lora.data.read import Source
from mlx_lora.errors import MlxLoraError, Problem
from mlx_lora.models import template, token_ids

# Consecutive pieces of a split text share this fraction of the length: the later one has it as context, without loss.
OVERLAP = 0.125


@dataclass(frozen=True)
class Row:
    """`tokens` int32 (T,), `weights` float32 (T,); the first token never carries loss."""

    tokens: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained(self) -> int:
        """Tokens with loss."""
        return int(np.count_nonzero(self.weights))


@dataclass
class Encoded:
    """The rows of one file, the examples that gave them (a split text gives several), and what became of others."""

    rows: list[Row] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the data settings that decide tokens and masks."""

    tokenizer: Any
    settings: Data

    def encode(self, source: Source, on_row: Callable[[], None] = lambda: None) -> Encoded:
        """Encode every example of a file; faults are collected, not raised."""
        result = Encoded()
        for example, line in zip(source.examples, source.lines, strict=True):
            on_row()
            try:
                tokens, weights = self.tokens(example)
                pieces = self._fit(example, tokens, weights, result)
            except ValueError as error:
                result.problems.append(Problem(str(source.file), line, str(error)))
                continue
            result.rows += pieces
            result.examples += [example] if pieces else []
        return result

    def tokens(self, example: Example) -> tuple[list[int], list[float]]:
        """Token ids and loss weights of a whole example.

        Raises ValueError naming what can't be encoded, or a token that the model's embedding has no row for.
        """
        if example.text is not None:
            if self.settings.template == "chat":
                raise ValueError("template chat needs messages, the row is plain text")
            tokens, weights = self._text(example.text)
        elif self.templated(example):
            tokens, weights = self._chat(example)
        else:
            tokens, weights = self._plain(example)
        return self._embedded(tokens), weights

    def prompt_tokens(self, example: Example) -> list[int]:
        """The tokens that generation starts from: everything before the answer.

        Raises ValueError for plain text, and for a token that the model's embedding has no row for.
        """
        if example.text is not None:
            raise ValueError("plain text has no prompt to answer")
        if self.templated(example):
            return self._embedded(self._render(example.messages[: example.prompt_messages], example.tools, prompt=True))
        assert example.plain is not None
        return self._embedded(self._without_end(self.tokenizer.encode(example.plain[0])))

    def templated(self, example: Example) -> bool:
        """Whether an example goes through the chat template."""
        if self.settings.template == "none":
            if example.plain is None:
                raise ValueError("template none needs text, or one prompt and one completion")
            return False
        available = bool(self.tokenizer.has_chat_template)
        if not available and (self.settings.template == "chat" or example.plain is None):
            raise ValueError("the tokenizer has no chat template")
        return available

    def _embedded(self, tokens: list[int]) -> list[int]:
        """`tokens`, each of which has a row in the model's embedding."""
        if found := token_ids.fault(self.tokenizer, tokens):
            raise ValueError(f"{found}: {token_ids.HINT}")
        return tokens

    def _text(self, text: str) -> tuple[list[int], list[float]]:
        if self.settings.mask not in ("auto", "all"):
            raise ValueError(f"mask {self.settings.mask} needs an answer, the row is plain text")
        tokens = self._ended(self.tokenizer.encode(text))
        return tokens, [0.0] + [1.0] * (len(tokens) - 1)

    def _plain(self, example: Example) -> tuple[list[int], list[float]]:
        assert example.plain is not None
        text, completion = example.plain
        prompt = self._without_end(self.tokenizer.encode(text))
        whole = self._without_end(self.tokenizer.encode(text + completion))
        if whole[: len(prompt)] != prompt:  # the join merges into one token: generation will see the prompt's own
            whole = prompt + self._continuation(completion)
        start = 1 if self.settings.mask == "all" else max(len(prompt), 1)
        whole = self._ended(whole)
        return whole, [0.0] * start + [1.0] * (len(whole) - start)

    def _continuation(self, text: str) -> list[int]:
        """The tokens of `text` after something else: alone, some tokenizers would put a space before it."""
        before, both = (list(self.tokenizer.encode(part, add_special_tokens=False)) for part in ("\n", "\n" + text))
        if both[: len(before)] == before:
            return both[len(before) :]
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _chat(self, example: Example) -> tuple[list[int], list[float]]:
        self._refuse_ends(example)
        if self.settings.mask == "all":
            whole = self._render(example.messages, example.tools)
            if example.messages[-1]["role"] == "assistant":
                whole = self._closed(whole)
            return whole, [0.0] + [1.0] * (len(whole) - 1)
        turns = self._learned_turns(example)
        whole = self._closed(self._render(example.messages[: turns[-1] + 1], example.tools))
        weights = [0.0] * len(whole)
        end = 0
        for turn in turns:
            start = self._prefix(example, turn, whole)
            end = self._turn_end(example, turn, whole, start, last=turn == turns[-1])
            weights[start:end] = [1.0] * (end - start)
        return whole[:end], weights[:end]

    def _closed(self, tokens: list[int]) -> list[int]:
        """A conversation up to its last end token; one is appended where the template writes none there."""
        ends = self._ends
        after = 1 + max((index for index, token in enumerate(tokens) if token in ends), default=-1)
        closed = after > 0 and not self.tokenizer.decode(tokens[after:]).strip()
        return tokens[:after] if closed else [*tokens, self._end]

    def _turn_end(self, example: Example, turn: int, whole: list[int], start: int, *, last: bool) -> int:
        """One past the end token of message `turn`, or past its last token where the template writes none between.

        Raises ValueError when the template shows nothing of the message, as some do with tool calls.
        """
        ends = self._ends
        own = whole if last else self._render(example.messages[: turn + 1], example.tools)
        if any(token in ends for token in own[start:]):
            end = 1 + next((i for i in range(start, len(whole)) if whole[i] in ends), len(whole) - 1)
        else:
            end = max(start, common(own, whole))
        if all(token in ends for token in whole[start:end]):
            raise ValueError(f"the chat template shows nothing of message {turn + 1}")
        return end

    def _refuse_ends(self, example: Example) -> None:
        """A text that holds the end token would end its turn there, and be learned up to there only."""
        ends = [self.tokenizer.decode([end]) for end in sorted(self._ends)]
        for index, message in enumerate(example.messages):
            for end in ends:
                if end.strip() and end in str(message.get("content") or ""):
                    raise ValueError(f"message {index + 1} holds the end token {end!r} inside its text")

    def _learned_turns(self, example: Example) -> list[int]:
        """Indices of the assistant messages that carry loss."""
        turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        mask = example.mask if self.settings.mask == "auto" else self.settings.mask
        if mask == "completion":
            return [turn for turn in turns if turn >= example.prompt_messages]
        return turns[-1:] if mask == "last" else turns

    def _prefix(self, example: Example, turn: int, whole: list[int]) -> int:
        """Where the answer of message `turn` starts: the length of its prompt, verified to be a token prefix."""
        prompt = self._render(example.messages[:turn], example.tools, prompt=True)
        if whole[: len(prompt)] != prompt:
            same = common(prompt, whole)
            raise ValueError(
                f"the chat template renders the prompt of message {turn + 1} differently once the answer follows "
                f"(from token {same} of {len(prompt)}); a mask there would be wrong, only data.mask=all is possible"
            )
        return len(prompt)

    def _render(self, messages: Iterable[dict[str, Any]], tools: Any, *, prompt: bool = False) -> list[int]:
        try:
            return template.render(self.tokenizer, messages, tools, prompt=prompt)
        except MlxLoraError:  # the template itself is at fault, not this row
            raise
        except Exception as error:  # jinja's own errors, and whatever a template raises
            raise ValueError(f"the chat template refuses this conversation: {shorten(str(error))}") from None

    @property
    def _ends(self) -> set[int]:
        return set(self.tokenizer.eos_token_ids)

    @property
    def _end(self) -> int:
        """The token that ends an answer."""
        end = self.tokenizer.eos_token_id
        if end is None and not self._ends:
            raise ValueError("the tokenizer has no end token")
        return int(min(self._ends) if end is None else end)

    def _without_end(self, tokens: Iterable[int]) -> list[int]:
        tokens = list(tokens)
        return tokens[:-1] if len(tokens) > 1 and tokens[-1] == self.tokenizer.eos_token_id else tokens

    def _ended(self, tokens: Iterable[int]) -> list[int]:
        """The end token once, whatever the tokenizer adds by itself or the text ends with."""
        tokens = list(tokens)
        while tokens and tokens[-1] == self._end:
            tokens.pop()
        return [*tokens, self._end]

    def _fit(self, example: Example, tokens: list[int], weights: list[float], result: Encoded) -> list[Row]:
        limit, choice = self.settings.max_seq_length, self.settings.too_long
        too_long = len(tokens) > limit
        if too_long and choice == "error":
            raise ValueError(
                f"{len(tokens)} tokens, data.max_seq_length is {limit} (data.too_long can drop, truncate or split)"
            )
        if too_long and choice == "drop":
            result.dropped += 1
            return []
        if too_long and choice == "split":
            if example.text is None:
                raise ValueError(f"{len(tokens)} tokens, and too_long split is for plain text only")
            return list(_pieces(tokens, limit))
        if too_long:
            cut = slice(-limit, None) if choice == "truncate-start" else slice(limit)
            tokens, weights = tokens[cut], [0.0, *weights[cut][1:]]
        if not any(weights):
            raise ValueError("no token carries loss" + (" after truncation" if too_long else ""))
        result.truncated += too_long
        return [_row(tokens, weights)]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _row(tokens: list[int], weights: list[float]) -> Row:
    return Row(np.array(tokens, np.int32), np.array(weights, np.float32))


def _pieces(tokens: list[int], limit: int) -> Iterator[Row]:
    """Rows of at most `limit` tokens; what one repeats of the one before is context, so each token is learned once."""
    overlap = max(1, int(limit * OVERLAP))
    for start in range(0, len(tokens) - overlap, limit - overlap):
        piece = tokens[start : start + limit]
        context = overlap if start else 1
        yield _row(piece, [0.0] * context + [1.0] * (len(piece) - context))
