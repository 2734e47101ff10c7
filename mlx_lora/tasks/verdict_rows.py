"""A verdict's table, and its rows by example: for the screen, and for a file that the user names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.data.example import Example
from mlx_lora.data.read import stream
from mlx_lora.data.splits import SPLITS
from mlx_lora.errors import NameTaken
from mlx_lora.study.behaviour import FAULTS
from mlx_lora.study.evaluate import RowResult
from mlx_lora.study.statistics import Difference
from mlx_lora.study.verdict import LOSS, NO_INTERVAL, WORDS
from mlx_lora.tasks.verdict import Judgement, Judgements
from mlx_lora.ui import json_text

MOST_SHOWN = 70


def table_of(one: Judgement) -> list[tuple[str, ...]]:
    """(what, base, tuned, difference, interval) of all that was measured, as text."""
    measured, general = one.compared.measured, one.general
    rows = [_line(WORDS.get(measured.metric, measured.metric), measured.base, measured.tuned, measured.difference)]
    if measured.loss is not None and measured.losses is not None:
        rows.append(_line("loss on the task", *measured.losses, measured.loss))
    if general is not None:
        rows.append(_line("loss on general text", general.loss_base, general.loss_tuned, general.difference))
    rows.append(("KL from the base on the task", "", f"{one.task.kl:.3f}", "", ""))
    if general is not None:
        rows.append(("KL from the base on general text", "", f"{general.kl:.3f}", "", ""))
    for where, looked in one.looked.items():
        asked = "general prompts" if where == "general" else "the task's prompts"
        for change in looked.changes:
            name = "tokens of an answer" if change.what == "length" else FAULTS[change.what][0]
            form = ".0f" if change.what == "length" else ".0%"
            if change.what == "length" or change.base or change.tuned:
                rows.append((f"{name}, {asked}", f"{change.base:{form}}", f"{change.tuned:{form}}", "", ""))
    return rows


def _line(name: str, base: float, tuned: float, found: Difference) -> tuple[str, ...]:
    low, high = found.interval
    interval = f"{low:+.3f} to {high:+.3f}" if found.rows > 1 else NO_INTERVAL
    return name, f"{base:.3f}", f"{tuned:.3f}", f"{found.estimate:+.3f}", interval


def examples_of(one: Judgement, found: Judgements, numbers: Sequence[int]) -> list[str]:
    """Lines that show some rows by their numbers: what was asked, what was wanted, and what both sides said."""
    pairs = {row.number: (row, other) for row, other in one.compared.pairs}
    asked = prompts(found, numbers)
    lines = []
    for number in numbers:
        base, tuned = pairs[number]
        if one.compared.measured.metric == LOSS or base.answer is None:
            said = f"loss {base.loss / max(base.tokens, 1):.2f}, now {tuned.loss / max(tuned.tokens, 1):.2f}"
        else:
            said = f"wanted {_short(base.wanted)}, base {_short(base.answer)}, now {_short(tuned.answer)}"
        lines.append(f"row {number + 1}: {_short(asked.get(number, ''))}: {said}")
    return lines


def prompts(found: Judgements, numbers: Sequence[int]) -> dict[int, str]:
    """What some rows ask, or the beginning of a plain text, read from the data file again."""
    wanted, last = set(numbers), max(numbers, default=-1)
    examples = (item.example for item in stream(found.file, found.settings) if item.example)
    return {
        number: asked_by(example)
        for number, example in enumerate(islice(examples, last + 1))
        if number in wanted and example is not None
    }


def asked_by(example: Example) -> str:
    """What an example asks: its prompt, the last message before the answer, or its text."""
    if example.text is not None:
        return example.text
    if example.plain is not None:
        return example.plain[0]
    return str(example.messages[example.prompt_messages - 1].get("content") or "") if example.prompt_messages else ""


def _short(text: str | None) -> str:
    text = " ".join((text or "").split())
    return repr(text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 1] + "…")


def check_out(out: Path, *, force: bool, sources: Sequence[str | Path | None] = ()) -> None:
    """Raise NameTaken where the file to write exists, or is one that is read; worth knowing before the work."""
    read = {Path(source).resolve() for source in sources if source is not None}
    if out.resolve() in read or out.resolve().parent in read and out.stem in SPLITS:
        raise NameTaken(f"{out} is a file that is read", hint="--out another file")
    if out.is_dir():
        raise NameTaken(f"{out} is a directory", hint="--out a file")
    if os.path.lexists(out) and not force:
        raise NameTaken(f"{out} exists", hint="--out another file, or --force to replace it")


def write_rows(found: Judgements, out: Path) -> None:
    """Write the verdict with all rows and their text to the file that the user named, readable by the user alone."""
    numbers = [row.number for one in found.each for row, _ in one.compared.pairs]
    asked = prompts(found, numbers)
    results = [
        {**judged.model_dump(mode="json"), "each": [_row(base, tuned, asked) for base, tuned in one.compared.pairs]}
        for judged, one in zip(found.record.results, found.each, strict=True)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.part")
    try:
        with paths.created(temporary) as stream_:
            stream_.write((json_text({**found.record.as_dict(), "why": found.why, "results": results}) + "\n").encode())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _row(base: RowResult, tuned: RowResult, asked: dict[int, str]) -> dict[str, Any]:
    sides = {
        name: {"loss": side.loss, "answer": side.answer, "score": side.score}
        for name, side in (("base", base), ("tuned", tuned))
    }
    return {"row": base.number, "prompt": asked.get(base.number), "wanted": base.wanted, "tokens": base.tokens, **sides}
