"""The bytes of one token: a token may be half a character, which no text can show."""

from __future__ import annotations

import re
from typing import Any

from mlx_lora.machine import allocation

with allocation.file_limits_kept():
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer, _byte_decoder

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token stands for; special tokens stand for their names."""
    name = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(name, str):  # the vocabulary of the model is larger than the tokenizer's
        return b""
    if token in tokenizer.added_tokens_decoder:
        return name.encode()
    kind = type(tokenizer.detokenizer)
    if issubclass(kind, BPEStreamingDetokenizer):
        decoder = _byte_decoder()
        return bytes(decoder[c] for c in name) if all(c in decoder for c in name) else name.encode()
    if issubclass(kind, SPMStreamingDetokenizer):
        byte = _BYTE.fullmatch(name)
        return bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode()
    return str(tokenizer.decode([token])).encode()
