"""A directory that `ollama create` makes a model of: GGUF, Modelfile and model card.

The prompt is the thing to get right: Ollama doesn't run the chat template of the tokenizer but one in Go's language.
It is written from what the chat template was seen to do (`interop.ollama.turns`), and where that can't be said exactly
no template is written, and the reason is a note.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mlx_lora import files, paths
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.errors import ModelError
from mlx_lora.interop.card import CARD, card, said_of
from mlx_lora.interop.ollama import modelfile
from mlx_lora.interop.ollama.modelfile import Modelfile
from mlx_lora.interop.ollama.template import PLAIN, go_template
from mlx_lora.interop.ollama.turns import Turns, learn
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.context import context_length
from mlx_lora.models.open import OpenModel
from mlx_lora.serve.conversation import Trained, trained
from mlx_lora.store.adapter import StoredAdapter
from mlx_lora.tasks.export_check import sources

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
REFUSES_ADAPTERS = "Ollama from 0.34.1 on is reported to refuse ADAPTER in `ollama create`"


class WriteGguf(Protocol):
    """Writes a merged model (`fused`) or an adapter as a GGUF file; what it returns has `check`, of which a gate says
    how the file compares with base and adapter, or None."""

    def __call__(
        self,
        model: str | None,
        adapter: str,
        out: Path,
        *,
        fused: bool = ...,
        type_name: str = ...,
        rank: int | None = ...,
        data: str | None = ...,
        force: bool = ...,
        progress: OnFile = ...,
    ) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Asking:
    """How Ollama asks an adapter: the template in Go's language, stop words, and what people should know of both."""

    family: str
    template: str | None
    stops: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)


def export_ollama(
    model: str | None,
    adapter: str,
    out: Path,
    *,
    write: WriteGguf,
    type_name: str = "q8_0",
    over: str | None = None,
    rank: int | None = None,
    data: str | None = None,
    force: bool = False,
    progress: OnFile = silent,
) -> dict[str, Any]:
    """Write the directory `out`, whole or not at all, and return what was written.

    `over` names the base as Ollama has it, a model's name or a GGUF file: then the adapter is written beside it and not
    merged, as the nearest LoRA of `rank` where that is given. `write` writes the GGUF. Raises before anything is
    written where `out` exists or the Modelfile can't say what it must; and whatever `write` raises, leaving nothing.
    """
    opened, stored = sources(model, adapter, out, force)
    asked = trained(stored)
    asking = asking_of(opened, asked)
    notes, text = _notes(asking, asked, over), _modelfile(opened, stored, asked, asking, over)
    file = MODEL if over is None else ADAPTER
    with paths.written_whole(out, force=force) as folder:
        chosen: dict[str, Any] = {"fused": over is None, "type_name": type_name, "rank": rank, "data": data}
        report = write(model, adapter, folder / file, **chosen, force=force, progress=progress)
        _write_text(folder / modelfile.NAME, text)
        _write_text(folder / CARD, _card(opened, stored, report, over, type_name, notes))
    return {
        "out": str(out),
        "model": over,
        "type": type_name if over is None else None,
        "template": asking.family,
        "stops": list(asking.stops),
        "bytes": paths.directory_bytes(out),
        "notes": notes,
        "command": f"ollama create {ollama_name(stored.name)} -f {shlex.quote(str(out / modelfile.NAME))}",
    } | {key: report.get(key) for key in ("check", "unchecked")}


def _write_text(file: Path, text: str) -> None:
    with paths.created(file) as stream:
        stream.write(text.encode())


def _notes(asking: Asking, asked: Trained, over: str | None) -> list[str]:
    notes = [*asking.notes, *([] if over is None else [REFUSES_ADAPTERS])]
    if lost := modelfile.dropped(asked.system or ""):
        notes.append(f"Ollama drops these characters of the system message when it reads it: {', '.join(lost)}")
    return notes


def _modelfile(opened: OpenModel, stored: StoredAdapter, asked: Trained, asking: Asking, over: str | None) -> str:
    """The Modelfile's text. Raises AdapterError for what it can't say, ModelError for a base that isn't there."""
    return Modelfile(
        f"./{MODEL}" if over is None else _base(over),
        None if over is None else f"./{ADAPTER}",
        asking.template,
        asked.system,
        asking.stops,
        _parameters(opened, stored),
        [f"{stored.name}: made by mlx-lora", f"ollama create {ollama_name(stored.name)} -f Modelfile"],
    ).text()


def asking_of(opened: OpenModel, asked: Trained) -> Asking:
    """How Ollama asks an adapter that was trained so, over this base."""
    tokenizer = opened.tokenizer
    chats = asked.format(tokenizer)
    if asked.template == "none" or not chats.available:
        ends = [end for end in (asked.answer_end, tokenizer.eos_token) if end]
        note = "it was trained without a chat template: each question is sent alone, as plain text"
        return Asking("none", PLAIN, ends[:1], [note])
    try:
        turns = learn(chats, thinking=asked.thinking, bos=_bos(tokenizer))
    except ValueError as reason:
        note = f"no TEMPLATE: {reason}. Ollama looks for one of its own that is like the tokenizer's, or uses none"
        return Asking("the tokenizer's", None, [], [f"the chat template isn't one of plain turns, {note}"])
    special = [token for token, _ in sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])]
    notes = [*_left_out(chats, turns, asked)]
    return Asking(turns.family, go_template(turns), modelfile.stop_words(turns, special), notes)


def _left_out(chats: ChatFormat, turns: Turns, asked: Trained) -> Iterator[str]:
    """What people should know of a template that holds turns alone."""
    if turns.system == "none" and asked.system:
        yield "the chat template leaves system messages out, and so does Ollama's"
    if asked.single_questions:
        yield "it was trained on single questions: earlier turns, which Ollama sends along, are new to it"
    question = [{"role": "user", "content": "?"}]
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
    view = chats.view(1, prompt=True, thinking=asked.thinking)
    with suppress(ValueError):
        if chats.texts(question, [tool], [view]) != chats.texts(question, (), [view]):
            yield "the chat template shows tools, and Ollama's doesn't: Ollama refuses requests with tools"


def ollama_name(name: str) -> str:
    """An adapter's name as Ollama allows one: ASCII letters in lower case, digits, `.`, `_` and `-`."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name.lower())
    return plain.strip(".-_") or "adapter"


def _bos(tokenizer: Any) -> str:
    """The start token where the tokenizer adds it by itself, as llama.cpp's does then."""
    bos = tokenizer.bos_token
    return bos if bos and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id] else ""


def _base(over: str) -> str:
    """What FROM names: a GGUF file by its whole path where `over` is a path, anything else as Ollama's own name."""
    if not (paths.is_path(over) or over.endswith(".gguf")):
        return over
    if (found := paths.existing(over)) and found.is_file():
        return str(found.resolve())
    raise ModelError(f"there is no file {over}", hint="--from NAME, as `ollama list` prints it, or a GGUF file")


def _parameters(opened: OpenModel, stored: StoredAdapter) -> dict[str, Any]:
    file = opened.path / "generation_config.json"
    generation = files.read_json(file, ModelError) if file.exists() else {}
    longest = ((stored.manifest.recipe or {}).get("data") or {}).get("max_seq_length")
    return modelfile.parameters(
        generation if isinstance(generation, dict) else {},
        context_length(opened.config),
        longest if isinstance(longest, int) else None,
    )


def _card(
    opened: OpenModel,
    stored: StoredAdapter,
    report: Mapping[str, Any],
    over: str | None,
    type_name: str,
    notes: Sequence[str],
) -> str:
    name = ollama_name(stored.name)
    form = f"GGUF model, merged, {type_name}" if over is None else "GGUF adapter, for a base that Ollama has"
    use = [f"`ollama create {name} -f Modelfile`, then `ollama run {name}`", *notes]
    return card(stored.manifest, name=stored.name, form=form, base=opened.path, checked=said_of(report), use=use)
