"""Log-probabilities of an answer's tokens, in the forms of both endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lora.models.token_bytes import token_bytes
from mlx_lora.serve.requests import Token

# JSON has no infinity: what a grammar forbids has this log-probability, as OpenAI writes it.
LEAST = -9999.0


def of_chat(tokenizer: Any, tokens: Sequence[Token]) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""
    content = [
        {**_item(tokenizer, token.token, token.logprob), "top_logprobs": [_item(tokenizer, *one) for one in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def of_completion(tokenizer: Any, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """`logprobs` of a completion's choice; `offset` is where the text of these tokens begins."""
    texts = [_text(token_bytes(tokenizer, token.token)) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            {_text(token_bytes(tokenizer, one)): _finite(value) for one, value in token.top} for token in tokens
        ],
        "text_offset": offsets,
    }


def _item(tokenizer: Any, token: int, logprob: float | None) -> dict[str, Any]:
    found = token_bytes(tokenizer, token)
    return {"token": _text(found), "logprob": _finite(logprob), "bytes": list(found)}


def _text(found: bytes) -> str:
    return found.decode("utf-8", "replace")


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)
