"""Chat templates for bases that have none: five well-known ones by name, or a file of jinja.

A template is written for one vocabulary: its markers are single tokens there. In another vocabulary a marker is
ordinary text, which can be learned. Only the end of a turn has to be one token, because generation stops at a token: it
is the template's own where the vocabulary has it, and the base's end token where it doesn't.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mlx_lora import files, paths
from mlx_lora.errors import ModelError, RecipeError
from mlx_lora.models.open import load_tokenizer

FOLDER = Path(__file__).with_name("jinja")
# The end of a turn in the vocabulary that a template was written for; "" for the base's own end token.
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "", "alpaca": ""}
# The other markers.
MARKERS = {
    "chatml": ("<|im_start|>",),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>"),
    "gemma": ("<start_of_turn>",),
    "mistral": ("[INST]", "[/INST]"),
    "alpaca": (),
}
log = logging.getLogger(__name__)


def find(name: str, tokenizer: Any) -> tuple[str, int | None]:
    """(jinja, the token that ends an answer) of a template by name or file, for this tokenizer's vocabulary.

    The token is None for a file: then the tokenizer's own end token ends an answer. Raises RecipeError for a name that
    isn't known and a file that can't be read.
    """
    if name in ENDS:
        return _named(name, tokenizer)
    file = paths.existing(name)
    if file is None or not file.is_file():
        raise RecipeError(f"data.template: there is no file {name}")
    return files.read_text(file, RecipeError), None


def give(model: Path, template: str, end: str | None) -> None:
    """Make a template a model directory's own, and let its end token end an answer wherever the model is loaded."""
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    if end is None:
        return
    tokenizer = load_tokenizer(model)
    file = model / "generation_config.json"
    generation = files.read_json(file, ModelError) if file.exists() else {}
    ends = {*tokenizer.eos_token_ids, tokenizer.get_vocab()[end]}
    file.write_text(json.dumps({**generation, "eos_token_id": sorted(ends)}, indent=2) + "\n", encoding="utf-8")


def _named(name: str, tokenizer: Any) -> tuple[str, int | None]:
    vocabulary = tokenizer.get_vocab()
    own = ENDS[name]
    end = own if own in vocabulary else tokenizer.eos_token
    if end is None:
        raise RecipeError(f"data.template: the tokenizer has no end token, and no {own or 'other'} for {name}")
    lacking = [marker for marker in (*MARKERS[name], own) if marker and marker not in vocabulary]
    if lacking:
        instead = f"; {end} ends an answer" if own in lacking else ""
        log.info(
            "template %s: the vocabulary has no token %s, they are written as text%s", name, ", ".join(lacking), instead
        )
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    words = {"end": end, "bos": tokenizer.bos_token if begins else ""}
    head = "".join(f"{{%- set {name} = {json.dumps(word)} -%}}\n" for name, word in words.items())
    return head + (FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), int(vocabulary[end])
