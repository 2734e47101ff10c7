"""A tokenizer as GGUF's metadata: tokens, their types, merges or scores, special tokens, and the chat template.

llama.cpp has rules for cutting text into words, by name, and no place for others. So the name is looked up by the
tokenizer's own rules, what would be written is read back as `import-gguf` reads it, and both must cut the same texts
into the same tokens. A tokenizer that differs is refused: its model would see other tokens than it was trained with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from gguf import TokenType

from mlx_lora.errors import ModelError
from mlx_lora.models.gguf.header import Fields
from mlx_lora.models.gguf.tokenizer import SPLITS, WHOLE_WORDS, Vocabulary, build_tokenizer

SPACE = "\u2581"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Composed characters alone: some tokenizers compose them first (NFC), and llama.cpp never does.
TEXTS = (
    "", "a", "Hello world", " Hello  world ", "   three   spaces   ", "\n", "\n\n\n", " \n \n", "the end \n",
    "\t\tif x:",
    "line one\nline two\n\n  indented", "12345678", "in 2024, 3.14159 and 1,000,000", "a1b22c333", "²³¼Ⅷ①٣४",
    "don't I'M we'Ll they'RE it's 'tis 'S", "naïve café Straße ŁÓDŹ", "Привет, мир! Ἑλλάς", "日本語のテキスト。",
    "中文字符", "한국어", "مرحبا بالعالم", "नमस्ते दुनिया", "emoji 🙂👩\u200d👩\u200d👧🇫🇷 end",
    "x = {'key': [1, 2.5e-3]} # comment!!! ???",
    "https://example.com/a?b=c&d=%20#e", "CamelCaseWords andHTMLParser2go", "a/b//c\\d\n/e", "$100 + €20 = £?",
    "............", "!!!\n\n???", "snake_case __init__ --flag", "SELECT name FROM t WHERE x >= 'y';",
)  # fmt: skip


def tokenizer_fields(
    tokenizer: Any, rows: int, *, chat_template: str | None = None, answer_end: str | None = None
) -> Fields:
    """The `tokenizer.*` metadata of mlx_lm's tokenizer for a model whose embedding has `rows` rows.

    `chat_template` and the token `answer_end` stand for the tokenizer's own where they are given. Raises ModelError for
    a tokenizer that GGUF can't say.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("the tokenizer has no tokenizer.json form, which a GGUF file is made from")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ModelError(f"a tokenizer of type {model['type']} has no GGUF form here; known: BPE")
    tokens, types = _tokens(content, rows)
    fields: Fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    fields |= _special(tokenizer, backend, answer_end)
    template = chat_template or getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        fields["tokenizer.chat_template"] = template
    if model.get("byte_fallback"):
        return _checked(fields | _scores(content, tokens, types), backend)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": merges}
    return _checked(fields | {"tokenizer.ggml.pre": _rule(content)}, backend)


def _tokens(content: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The token of every row of the embedding, and its type; rows without one are unused."""
    known = {index: token for token, index in content["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    known |= {index: entry["content"] for index, entry in added.items()}
    if known and max(known) >= rows:
        raise ModelError(f"the tokenizer has a token {max(known)}, and the model's embedding has {rows} rows")
    unknown, fallback = content["model"].get("unk_token"), bool(content["model"].get("byte_fallback"))
    types = []
    for index in range(rows):
        if index not in known:
            kind = TokenType.UNUSED
        elif known[index] == unknown:
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        else:
            kind = TokenType.BYTE if fallback and BYTE.fullmatch(known[index]) else TokenType.NORMAL
        types.append(int(kind))
        if fallback and kind == TokenType.USER_DEFINED:  # llama.cpp looks for these before it writes spaces as ▁
            known[index] = known[index].replace(SPACE, " ")
    return [known.get(index, f"[PAD{index}]") for index in range(rows)], types


def _special(tokenizer: Any, backend: Any, answer_end: str | None) -> Fields:
    """Ids of the tokens with a role, and whether a text begins or ends with one."""
    roles = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id,
             "unknown": tokenizer.unk_token_id}  # fmt: skip
    ends = [index for index in _ends(tokenizer) if index != roles["eos"]]
    turn = backend.token_to_id(answer_end) if answer_end is not None else None
    ends = list(dict.fromkeys([*([turn] if turn not in (None, roles["eos"]) else []), *ends]))
    roles |= dict(zip(("eot", "eom"), ends, strict=False))
    fields: Fields = {
        f"tokenizer.ggml.{name}_token_id": int(index) for name, index in roles.items() if index is not None
    }
    encoded, bare = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
    fields["tokenizer.ggml.add_bos_token"] = encoded[: -len(bare) or None][:1] == [roles["bos"]]
    fields["tokenizer.ggml.add_eos_token"] = len(encoded) > len(bare) and encoded[-1] == roles["eos"]
    return fields


def _ends(tokenizer: Any) -> list[int]:
    """Every token that ends an answer: mlx_lm's tokenizers have a set of them, transformers' have one."""
    ends = getattr(tokenizer, "eos_token_ids", None)
    return sorted(ends) if isinstance(ends, set | frozenset | list) else []


def _scores(content: dict[str, Any], tokens: list[str], types: list[int]) -> Fields:
    """SentencePiece's scores: the earlier a token is merged, the higher its score."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(content["model"]["merges"]):
        first.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    last = len(content["model"]["merges"])
    scores = [
        float(-first.get(token, last + index)) if kind == TokenType.NORMAL else 0.0
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _leading_space(content),
    }


def _leading_space(content: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    parts = [*_parts(content["normalizer"], "normalizers"), *_parts(content["pre_tokenizer"], "pretokenizers")]
    prepends = any(part["type"] == "Prepend" and part["prepend"] == SPACE for part in parts)
    return prepends or any(part["type"] == "Metaspace" and part["prepend_scheme"] != "never" for part in parts)


def _rule(content: dict[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level tokenizer cuts text into words."""
    expressions: list[str] = []
    for part in _parts(content["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Split" and "Regex" in part["pattern"] and part["behavior"] in ("Isolated", "Removed"):
            expressions.append(part["pattern"]["Regex"])
        elif part["type"] == "Digits" and part["individual_digits"]:
            expressions.append(r"\p{N}")
        elif part["type"] == "ByteLevel":
            expressions += [SPLITS["gpt-2"][0]] if part["use_regex"] else []
        else:
            raise ModelError(f"the tokenizer cuts text by {part['type']}, which llama.cpp has no name for")
    whole = bool(content["model"].get("ignore_merges"))
    named = [name for name, known in SPLITS.items() if _alike(known) == _alike(expressions)]
    named = [name for name in named if (name in WHOLE_WORDS) == whole]
    if not named:
        raise ModelError(f"llama.cpp has no name for how the tokenizer cuts text into words: {expressions}")
    return named[0]


def _alike(expressions: Any) -> tuple[str, ...]:
    """Expressions without what changes nothing: a last alternative that takes the space no other has taken."""
    return tuple(expression.removesuffix(r"|\s+") for expression in expressions)


def _parts(part: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """A step of a tokenizer.json, or the steps of a sequence."""
    if part is not None and part["type"] == "Sequence":
        for one in part[inner]:
            yield from _parts(one, inner)
    elif part is not None:
        yield part


def _checked(fields: Fields, backend: Any) -> Fields:
    """`fields`, if a tokenizer made of them cuts every text as the tokenizer itself does."""
    again = build_tokenizer(Vocabulary.read(fields))
    for text in (*TEXTS, *_with_special(fields)):
        ours, theirs = backend.encode(text).ids, again.encode(text).ids
        if ours != theirs:
            raise ModelError(
                f"as GGUF the tokenizer would cut {text!r} into {theirs[:12]}, not into {ours[:12]}",
                hint="its rules have no name in llama.cpp; `mlx-lora fuse` merges into an MLX model",
            )
    return fields


def _with_special(fields: Fields) -> Iterator[str]:
    """Texts with special and added tokens in them."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    added = [token for token, kind in zip(tokens, types, strict=True) if kind in (3, 4)]
    for token in [*added[:8], *added[-2:]]:
        yield f"{token}user\nHi there{token} and\n{token}"
        yield f"a {token} b"
