"""Trains the SentencePiece tokenizer of the tiny base and writes an equal `tokenizer.json` and the chat template.

Design: a space is always a piece of its own, so a name has the same pieces after a space, a quote or a newline, and
copying it is copying the same ids. Known words count many times in the training text, names never: merges go to words,
and every name, known or not, is spelled from small pieces.
"""

import contextlib
import json
import random
import re
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from .corpus import conversations
from .tasks import MAILS, ROW_MAKERS, known_words, mail_row, make_rows
from .words import CITIES, COMMON_WORDS, FIRST_NAMES, LAST_NAMES, Values, invented_word

VOCABULARY_SIZE = 1536
BEGIN, END = "<|begin|>", "<|end|>"
ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
MARKERS = (BEGIN, END, *ROLE_MARKERS)
SPACE = "\u2581"  # how SentencePiece writes a space
MAX_LENGTH = 1024
KNOWN_WORD_COUNT = 1000  # a known word weighs like this many invented ones

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools %}{{- '<|system|>' + (tools | tojson) + eos_token -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('Unknown role: ' + message.role + '. Known roles: system, user, assistant, tool.') -}}
{%- endif -%}
{{- '<|' + message.role + '|>' + (message.content or '') -}}
{%- if message.tool_calls %}{{- message.tool_calls | tojson -}}{%- endif -%}
{{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|assistant|>' -}}{%- endif -%}
"""


def sample_texts(seed: int, count: int) -> list[str]:
    """Message texts of the corpus and of the training rows of the tasks."""
    texts = [
        message["content"] for messages in islice(conversations(seed, first_part=False), count) for message in messages
    ]
    row_makers = ROW_MAKERS | {"mail": partial(mail_row, kinds=MAILS)}
    for task, make_row in row_makers.items():
        for row in make_rows(task, "train", seed, make_row):
            strings = [message["content"] for message in row["messages"]] if "messages" in row else row.values()
            texts += strings
    return texts


def word_counts(seed: int) -> Counter[str]:
    """Words, punctuation runs and invented names with the weights that decide the merges."""
    texts = sample_texts(seed, 16000)
    pieces = Counter(piece for text in texts for piece in re.findall(r"[A-Za-z]+|[^A-Za-z0-9\s]+", text))
    names = {part for name in (*FIRST_NAMES, *LAST_NAMES, *CITIES) for part in name.split()}
    counts: Counter[str] = Counter()
    for piece, count in pieces.items():
        is_code = piece.isupper() and len(piece) <= 3
        if piece in names or is_code:
            counts[piece] = 1
        elif not piece.isalpha():
            counts[piece] = count
        else:
            counts[piece] = KNOWN_WORD_COUNT + count if count >= 50 else 1
    for word in (set(known_words()) - names) | {chr(code) for code in range(33, 127)}:
        counts[word] = max(counts[word], KNOWN_WORD_COUNT)
    return counts


def train_sentencepiece(folder: Path, seed: int) -> None:
    """Write `tokenizer.model`."""
    word_list = folder / "words.tsv"
    counts = word_counts(seed)
    word_list.write_text("".join(f"{word}\t{counts[word]}\n" for word in sorted(counts)), encoding="utf-8")
    settings = dict(
        input=word_list.name,
        input_format="tsv",
        model_prefix="tokenizer",
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        character_coverage=1.0,
        user_defined_symbols=[*MARKERS, "\n", SPACE],
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    with contextlib.chdir(folder):  # the model file records its input's path: keep it free of this machine's folders
        sentencepiece.SentencePieceTrainer.train(**settings)
    word_list.unlink()
    (folder / "tokenizer.vocab").unlink()


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order in which SentencePiece learned the results."""
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def write_tokenizer_json(folder: Path) -> None:
    """Write `tokenizer.json` with the same pieces, ids and merges as `tokenizer.model`."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(index) for index in range(len(processor))]
    fixed = {"<unk>", *MARKERS, "\n", SPACE}
    learned = [piece for index, piece in enumerate(pieces) if piece not in fixed and not processor.is_byte(index)]
    tokenizer = Tokenizer(
        BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=_merges(learned),
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SPACE), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in MARKERS])
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_settings(folder: Path) -> None:
    """Write the chat template and `tokenizer_config.json`."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
    }
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def awkward_texts(seed: int, count: int) -> list[str]:
    """Random texts that tokenizers tend to disagree on."""
    rng = random.Random(f"{seed} awkward")
    values = Values(rng, "test")
    fragments = [
        lambda: " " * rng.randint(1, 5),
        lambda: "\n" * rng.randint(1, 3),
        lambda: rng.choice("\t\r\u00a0\u2581\u3000\u200b\ufeff"),
        lambda: chr(rng.randrange(0xA1, 0x3000)),
        lambda: chr(rng.randrange(0x4E00, 0x9FFF)),
        lambda: chr(rng.randrange(0x1F300, 0x1F6FF)),
        lambda: "".join(chr(rng.randrange(33, 127)) for _ in range(rng.randint(1, 8))),
        lambda: rng.choice((*MARKERS, "<unk>", "<s>", "</s>", "<0x41>", "<|", "|>", "<|user|", "e\u0301", "Zo\u00eb")),
        values.person,
        values.city,
        values.code,
        lambda: invented_word(rng),
        lambda: rng.choice(COMMON_WORDS) * rng.randint(1, 2),
        lambda: json.dumps({"who": values.person()}),
    ]
    return ["".join(rng.choice(fragments)() for _ in range(rng.randint(1, 12))) for _ in range(count)]


def verify(folder: Path, seed: int, count: int = 5000) -> int:
    """Check that both files give the same ids and the same text back; return the number of texts compared."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = awkward_texts(seed, count) + sample_texts(seed, count // 4)
    for text in texts:
        expected, found = processor.encode(text), tokenizer.encode(text).ids
        if expected != found:
            raise ValueError(f"tokenizer.json disagrees on {text!r}: {found} instead of {expected}")
        if tokenizer.decode(found, skip_special_tokens=False) != text.replace(SPACE, " "):
            raise ValueError(f"tokenizer.json does not give {text!r} back")
    return len(texts)


def make_tokenizer(folder: Path, seed: int) -> int:
    """Write all tokenizer files of the base; return the number of texts on which both kinds agreed."""
    folder.mkdir(parents=True, exist_ok=True)
    train_sentencepiece(folder, seed)
    write_tokenizer_json(folder)
    write_settings(folder)
    return verify(folder, seed)
