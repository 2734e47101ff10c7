"""Who a request asks: the base or one of its adapters, by the name that /v1/models lists."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from mlx_lora.errors import AdapterError, MlxLoraError
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.context import context_length
from mlx_lora.serve.conversation import Trained
from mlx_lora.serve.openai.errors import ApiError, refused, without_folders
from mlx_lora.serve.residence import identity
from mlx_lora.serve.service import Prompt, Service

# Characters of a prompt for each token at most; texts have about 4, and indented code 8. Encoding a million takes
# seconds, and a tokenizer encodes one prompt at a time: what can't fit isn't encoded.
CHARACTERS = 16


@dataclass(frozen=True)
class Target:
    """Who is asked: an adapter of a service, None for the base."""

    service: Service
    adapter: str | None

    @cached_property
    def trained(self) -> Trained:
        return self.service.trained(self.adapter)

    @cached_property
    def format(self) -> ChatFormat:
        return self.trained.format(self.service.tokenizer)

    @cached_property
    def template(self) -> str:
        own = self.service.tokenizer.chat_template
        return self.trained.chat_template or (own if isinstance(own, str) else "")

    @cached_property
    def fingerprint(self) -> str:
        """What an answer depends on beside its request: the base, and the adapter with its files as they are now."""
        files = None if self.adapter is None else identity(self.service.find(self.adapter))
        known = [self.service.base, self.service.config, self.adapter, str(self.trained), str(files)]
        return "fp_" + hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def tokens(self, text: str) -> tuple[int, ...]:
        """The tokens of a mark."""
        return tuple(self.format.encode([text])[0])

    def check_length(self, param: str, characters: int) -> None:
        """Raise ApiError for a prompt of so many characters, before it is encoded, where it can't fit the context."""
        context = context_length(self.service.config)
        if context is not None and characters > CHARACTERS * context:
            raise refused(
                param, f"the prompt has {characters:,} characters, this model's context is {context:,} tokens",
                "context_length_exceeded",
            )  # fmt: skip

    def most_tokens(self, prompt: Prompt, asked: int | None, usual: int) -> int:
        """How many tokens the answer may have. Raises ApiError for a prompt that is longer than the context."""
        context = context_length(self.service.config)
        if context is None:
            return asked or usual
        if len(prompt.tokens) > context:
            raise refused(
                "messages", f"the prompt has {len(prompt.tokens):,} tokens, this model's context is {context:,}",
                "context_length_exceeded",
            )  # fmt: skip
        return max(min(asked or usual, context - len(prompt.tokens) + 1), 1)


def find_model(service: Service, name: str) -> Target:
    """The base or the adapter of a name. Raises ApiError 404 for any other."""
    if name == service.base:
        return Target(service, None)
    try:
        target = Target(service, name)
        _ = target.trained
    except AdapterError as error:
        why = without_folders(error.message)
        raise ApiError(404, "model_not_found", f"no model {name[:80]!r}: {why}", "model") from None
    except MlxLoraError:
        raise ApiError(404, "model_not_found", f"no model {name[:80]!r}; /v1/models lists them", "model") from None
    return target
