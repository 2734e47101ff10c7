"""Where texts and answers end in tokens: the end token once, and nothing behind it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mlx_lora.data.turns import Tokens
from mlx_lora.models.chat_format import ChatFormat

# Tokens behind an answer's end that are remembered as blank or not.
FEW = 3


@dataclass(frozen=True)
class Ends:
    """The end tokens of one tokenizer's chats."""

    chat: ChatFormat

    def continuation(self, text: str) -> Tokens:
        """The tokens of `text` after something else: alone, some tokenizers would put a space before it."""
        before, both = (
            list(self.chat.tokenizer.encode(part, add_special_tokens=False)) for part in ("\n", "\n" + text)
        )
        if both[: len(before)] == before:
            return both[len(before) :]
        return list(self.chat.tokenizer.encode(text, add_special_tokens=False))

    def closed(self, tokens: Tokens) -> Tokens:
        """An answer up to its last end token; one is appended where the template writes none there."""
        after = next((place for place in range(len(tokens), 0, -1) if tokens[place - 1] in self.chat.ends), 0)
        if not after or not self._is_blank(tuple(tokens[after:])):
            return [*tokens, self.chat.end]
        return tokens[:after]

    def _is_blank(self, tokens: tuple[int, ...]) -> bool:
        """Whether tokens are white space; the same few follow every answer, and are remembered."""
        if len(tokens) > FEW:
            return not self.chat.tokenizer.decode(list(tokens)).strip()
        if tokens not in self._blank:
            self._blank[tokens] = not self.chat.tokenizer.decode(list(tokens)).strip()
        return self._blank[tokens]

    @cached_property
    def _blank(self) -> dict[tuple[int, ...], bool]:
        return {(): True}

    @cached_property
    def texts(self) -> list[str]:
        """The end tokens as text."""
        texts = [self.chat.tokenizer.decode([end]) for end in sorted(self.chat.ends)]
        return [text for text in texts if text.strip()]

    def without(self, tokens: Tokens) -> Tokens:
        """The tokens of a text that goes on: without the end token that some tokenizers add by themselves."""
        return tokens[:-1] if len(tokens) > 1 and tokens[-1] == self.chat.tokenizer.eos_token_id else tokens

    def ended(self, tokens: Tokens) -> Tokens:
        """The end token once, whatever the tokenizer adds by itself or the text ends with."""
        count = len(tokens)
        while count and tokens[count - 1] == self.chat.end:
            count -= 1
        return [*tokens[:count], self.chat.end]
