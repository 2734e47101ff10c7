"""Write tokenizer.json and the other tokenizer files from the vocabulary in a GGUF file.

Files of the supported architecture have one of two kinds. `gpt2` is byte-level BPE: the file has tokens and merges, and
names the rule that splits text into words before merging. `llama` is SentencePiece's BPE: the file has tokens and
scores. Neighbours whose union has the best score merge first, and characters without a token become bytes.

For settings that a file leaves out, this follows llama.cpp, the program such files are written for. But where
llama.cpp would guess how to split text, this refuses the file: a wrong split changes all following tokens, and nothing
would show it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_lora import files
from mlx_lora.errors import ModelError, nearest

# Each expression splits the pieces that the previous one left; text between two matches is also a piece.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (_O200K,)),
}
# With these rules, a word that is itself a token isn't merged from parts, and text begins with the BOS token unless the
# file says otherwise.
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral", "tekken"}
# Tokens that end a turn in common chat templates. They are used in addition to the file's end-of-text token.
_ENDS_TURN = {
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|return|>", "<|call|>",
}  # fmt: skip
_SPACE = "\u2581"
_KEEPS_SPACE = {"<unk>", "<s>", "<|endoftext|>"}  # Phi-3's special tokens that don't take the space after them
# The longest tokens of published models are runs of some hundred spaces.
_LONGEST_TOKEN = 4096


@dataclass(frozen=True)
class Vocabulary:
    """A GGUF file's tokens: their texts, types (`gguf.TokenType`), and the ids of tokens with a role (bos, eos, …)."""

    fields: dict[str, Any]
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Vocabulary:
        """Read the vocabulary from the file's metadata; ModelError if it is missing or inconsistent."""
        tokens = fields.get("tokenizer.ggml.tokens") or []
        types = fields.get("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)
        if not tokens or len(types) != len(tokens):
            raise ModelError(f"the file's vocabulary is incomplete: {len(tokens)} tokens, {len(types)} token types")
        if len(set(tokens)) != len(tokens):
            raise ModelError(f"the file's vocabulary names {len(tokens) - len(set(tokens))} of its tokens twice")
        if (longest := max(map(len, tokens))) > _LONGEST_TOKEN:
            raise ModelError(f"the file's vocabulary has a token of {longest} characters")
        # Files with SentencePiece models that were written before these keys existed all have Llama's ids.
        ids = {"unknown": 0, "bos": 1, "eos": 2} if fields.get("tokenizer.ggml.model") == "llama" else {}
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
            if (index := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
                ids[name] = index
        outside = [name for name, index in ids.items() if not 0 <= index < len(tokens)]
        if outside:
            raise ModelError(f"the file's {', '.join(outside)} token is outside its {len(tokens)} tokens")
        return cls(fields, tokens, types, ids)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean setting of the tokenizer."""
        return bool(self.fields.get(f"tokenizer.ggml.{name}", default))

    @property
    def special(self) -> set[int]:
        """Ids that are never split and left out of decoded text: control tokens, tokens that begin or end a text."""
        control = {i for i, kind in enumerate(self.types) if kind in (TokenType.CONTROL, TokenType.UNKNOWN)}
        return control | {self.ids[name] for name in ("bos", "eos", "eot", "eom") if name in self.ids}

    @property
    def ends(self) -> list[int]:
        """Ids that end a generation: the end of text first, then the ends of a turn."""
        ends = [self.ids[name] for name in ("eos", "eot", "eom") if name in self.ids]
        # gpt-oss ends a turn with <|return|> or <|call|>; <|end|> is only the end of one of the turn's channels.
        turns = _ENDS_TURN - {"<|end|>"} if "<|return|>" in self.tokens else _ENDS_TURN
        return list(dict.fromkeys(ends + [i for i in sorted(self.special) if self.tokens[i] in turns]))


def write_tokenizer(fields: dict[str, Any], directory: Path, *, context_length: int) -> dict[str, Any]:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the chat template into `directory`.

    `fields` is the GGUF metadata by key. Returns the token ids for config.json: `bos_token_id`, `eos_token_id`,
    `pad_token_id`, those that the file names. Raises ModelError for a vocabulary that can't be converted exactly.
    """
    vocabulary = Vocabulary.read(fields)
    build_tokenizer(vocabulary).save(str(directory / "tokenizer.json"))
    tokens, ids = vocabulary.tokens, vocabulary.ids
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        # Loading makes every token listed here special, but some files name an ordinary token as the unknown one.
        if name in ids and ids[name] in vocabulary.special:
            settings[key] = tokens[ids[name]]
    write_json(directory / "tokenizer_config.json", settings)

    config = {"bos_token_id": ids.get("bos"), "eos_token_id": ids.get("eos"), "pad_token_id": ids.get("padding")}
    config = {key: index for key, index in config.items() if index is not None}
    write_json(directory / "generation_config.json", {**config, "eos_token_id": vocabulary.ends})
    if template := fields.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return config


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The `tokenizers` object that splits text as llama.cpp does with this vocabulary."""
    kind = vocabulary.fields.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ModelError(f"tokenizer type {kind!r} is not supported; known: {', '.join(builders)}")
    with files.refusing(ModelError, "the file's vocabulary is inconsistent"):  # such as merges of unknown tokens
        tokenizer, adds_bos = builders[kind](vocabulary)
        special = vocabulary.special
        added = special | {i for i, kind in enumerate(vocabulary.types) if kind == TokenType.USER_DEFINED}
        strips = _takes_following_space(vocabulary)
        tokenizer.add_tokens(
            [
                AddedToken(token, special=i in special, normalized=False, rstrip=strips and token not in _KEEPS_SPACE)
                for i, token in ((i, vocabulary.tokens[i]) for i in sorted(added))
            ]
        )
        _add_bos_and_eos(tokenizer, vocabulary, adds_bos)
    return tokenizer


def _takes_following_space(vocabulary: Vocabulary) -> bool:
    """Whether special tokens take the white space after them: Phi-3's do, which a file shows by its name only."""
    name = str(vocabulary.fields.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _byte_level(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether text begins with BOS if the file doesn't say."""
    rule = vocabulary.fields.get("tokenizer.ggml.pre")
    if rule is None:
        raise ModelError(
            "the file doesn't say how its tokenizer splits words (tokenizer.ggml.pre)",
            hint="it was written by an old converter; convert the model again with a current llama.cpp",
        )
    if rule not in SPLITS:
        raise ModelError(f"pre-tokenizer {rule!r} is not supported{nearest(str(rule), SPLITS)}")
    merges = [tuple(merge.split(" ")) for merge in vocabulary.fields.get("tokenizer.ggml.merges") or []]
    if not merges or any(len(pair) != 2 for pair in merges):
        raise ModelError("the file's tokenizer has no merges, or merges that are not pairs")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary.tokens)},
            merges=merges,
            ignore_merges=rule in WHOLE_WORDS,
        )
    )
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[rule]]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule in WHOLE_WORDS


def _sentencepiece(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE with byte fallback, and True: text begins with BOS if the file doesn't say."""
    tokens = vocabulary.tokens
    scores = vocabulary.fields.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise ModelError(f"the file's tokenizer has {len(scores)} scores for {len(tokens)} tokens")
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_by_score(ids, scores, vocabulary.types),
            unk_token=tokens[vocabulary.ids["unknown"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # A normalizer adds the leading space to every piece of text between special tokens, as llama.cpp does.
    leading = vocabulary.flag("add_space_prefix", True)
    prepend = [normalizers.Prepend(_SPACE)] if leading else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if leading else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def _merges_by_score(ids: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """All pairs of tokens whose union is a token, best score first, which is the order of SentencePiece's merges."""
    ranked = []
    for token, i in ids.items():
        if types[i] != TokenType.NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[i], -cut, left, right))
    ranked.sort()
    return [(left, right) for _, _, left, right in ranked]


def _add_bos_and_eos(tokenizer: Tokenizer, vocabulary: Vocabulary, default_bos: bool) -> None:
    """Add BOS before and EOS after a text if the file's settings say so and it has such a token."""
    ids = vocabulary.ids
    bos = "bos" in ids and vocabulary.flag("add_bos_token", default_bos)
    eos = "eos" in ids and vocabulary.flag("add_eos_token", False)
    single = ["bos:0"] * bos + ["$A:0"] + ["eos:0"] * eos
    pair = single + ["bos:1"] * bos + ["$B:1"] + ["eos:1"] * eos
    # The template calls them "bos" and "eos", because it can't contain a token's text that has a colon in it.
    tokens = [
        {"id": name, "ids": [ids[name]], "tokens": [vocabulary.tokens[ids[name]]]}
        for name in ("bos", "eos")
        if name in ids
    ]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write `content` as the indented JSON of a model directory."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
