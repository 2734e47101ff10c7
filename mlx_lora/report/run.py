"""What a run left, as sections of a report: how it ended, its curves, memory, data, settings, and a few answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora import ui
from mlx_lora.config import Recipe
from mlx_lora.report import page, verdict
from mlx_lora.report.sample import Sample
from mlx_lora.report.svg import Bar, Curve, Figures
from mlx_lora.settings import flat
from mlx_lora.store.manifest import Manifest
from mlx_lora.store.run import RunRecord
from mlx_lora.store.verdict import Judged
from mlx_lora.study.ending import ending


@dataclass(frozen=True)
class Report:
    """All that a report is made of. `record` is None for a verdict alone.

    `note` says what of the texts isn't there and why; without samples a report holds no text of anybody's files.
    """

    name: str
    record: RunRecord | None = None
    manifest: Manifest | None = None
    results: Sequence[Judged] = ()
    samples: Sequence[Sample] = ()
    changed: Sequence[Sample] = ()
    note: str = ""
    figures: Figures = field(default_factory=Figures)


def html(report: Report) -> str:
    """The whole file."""
    parts = []
    if report.record:
        parts += [_head(report, report.record), verdict.sections(report.results, report.changed, report.figures, "")]
        parts += [_curves(report.record, report.figures), _memory(report.record, report.figures)]
        parts += [_answers(report), _data(report.record, report.manifest), _settings(report.record)]
    else:
        parts += [f"<h1>{page.text(report.name)}</h1>\n", page.paragraph("A verdict on adapters.", "soft")]
        parts += [verdict.sections(report.results, report.changed, report.figures, report.note)]
    return page.document(f"{report.name}: mlx-lora report", "".join(parts))


def _head(report: Report, record: RunRecord) -> str:
    found, done = ending(record), record.finished
    model = Path(record.recipe.model).name if record.recipe and record.recipe.model else None
    base = report.manifest.base.name if report.manifest and report.manifest.base else model
    said = f"{record.state}, {record.step} of {record.planned_steps or '?'} steps"
    tiles = {
        "training loss": _loss(record.train_loss),
        "lowest validation loss": _loss(record.best_valid_loss),
        "epochs": f"{done.epochs:g}" if done else "–",
        "time": ui.duration(done.seconds) if done else "–",
        "tokens learned": f"{done.trained_tokens:,}" if done else "–",
        "peak memory": ui.size(done.peak_memory_bytes) if done else "–",
    }
    begun = f", begun {record.started}" if record.started else ""
    return (
        f"<h1>{page.text(record.name)}</h1>\n"
        + page.paragraph(f"{_method(record.recipe)} on {base or 'an unknown base'}{begun}; {said}", "soft")
        + page.paragraph(f"{found.text[:1].upper()}{found.text[1:]}." if found else "No step was taken.", "lead")
        + page.numbers(tiles)
    )


def _method(recipe: Recipe | None) -> str:
    return f"{recipe.adapter.method} of rank {recipe.adapter.rank}" if recipe else "an adapter"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _curves(record: RunRecord, figures: Figures) -> str:
    losses = [(line.step, line.loss) for line in record.steps if line.loss is not None]
    valid = [(line.step, line.loss) for line in record.evaluations if line.loss is not None]
    rates = [(line.step, line.learning_rate) for line in record.steps if line.learning_rate is not None]
    norms = [(line.step, line.gradient_norm) for line in record.steps if line.gradient_norm is not None]
    speeds = [(line.step, line.tokens_per_second) for line in record.steps if line.tokens_per_second is not None]
    loss = figures.chart(
        [Curve("training", losses), Curve("validation", valid, marks=True)],
        title=f"Loss of {record.name} over its steps", across="step", up="nats a token",
    )  # fmt: skip
    rate = figures.chart(
        [Curve("learning rate", rates)], title="Learning rate", across="step", up="learning rate", linear=True
    )
    norm = figures.chart([Curve("norm of the gradient", norms)], title="Norm of the gradient", across="step", up="norm")
    speed = figures.chart(
        [Curve("tokens with loss", speeds)], title="Speed", across="step", up="tokens a second", linear=True
    )
    caption = "Validation at step 0 is the base without the adapter."
    table = page.table(["step", "validation loss"], valid, "Validation loss, nats a token")
    return page.section(
        "Loss", page.figure(loss, caption if valid else ""), page.folded("validation losses as a table", table)
    ) + page.section("Rate, gradients and speed", page.small(page.figure(rate), page.figure(norm), page.figure(speed)))


def _memory(record: RunRecord, figures: Figures) -> str:
    first = record.first
    measured = (
        record.finished.peak_memory_bytes if record.finished else max((s.peak_memory for s in record.steps), default=0)
    )
    known = [
        ("predicted", first.predicted_memory_bytes if first else None, False),
        ("measured peak", measured or None, False),
        ("limit", first.memory_limit_bytes if first else None, True),
    ]
    bars = [Bar(name, value, ui.size(value), limit) for name, value, limit in known if value is not None]
    note = "" if first and first.predicted_memory_bytes else "What was predicted isn't in this run's record."
    bars_alone = [bar for bar in bars if not bar.limit]
    # a limit that is far above would leave no length for the others
    apart = bool(bars_alone) and bars[-1].limit and bars[-1].value > 8 * max(bar.value for bar in bars_alone)
    if apart:
        note = f"The limit was {bars[-1].shown}, far above."
    drawn = figures.bars(bars_alone if apart else bars, title="Memory of training") if bars else ""
    return page.section("Memory", page.figure(drawn), page.paragraph(note, "soft"))


def _answers(report: Report) -> str:
    note = page.paragraph(report.note, "soft")
    return page.section("Answers to validation rows", note, *(sample.html() for sample in report.samples))


def _data(record: RunRecord, manifest: Manifest | None) -> str:
    first = record.first
    used = {}
    if first and first.rows is not None:
        used = {"rows trained on": f"{first.rows:,}", "rows validated on": f"{first.valid_rows or 0:,}"}
    if record.finished and first and first.rows:
        per_row = record.finished.trained_tokens / max(record.finished.epochs * first.rows, 1e-9)
        used["learned tokens a row"] = f"{per_row:.1f}"
    rows = [
        (str(f.get("file")), f.get("rows"), f.get("tokens"), f.get("trained_tokens"), str(f.get("sha256", ""))[:16])
        for f in (manifest.data if manifest else [])
    ]
    headers = ["file", "rows", "tokens", "with loss", "sha256 begins"]
    return page.section("Data", page.numbers(used), page.table(headers, rows, "Files as they were read"))


def _settings(record: RunRecord) -> str:
    if not record.recipe:
        return ""
    values, defaults = flat(record.recipe.model_dump(mode="json")), flat(Recipe().model_dump(mode="json"))
    for key in ("model", "data.path", "data.template"):  # a report may be given away: paths of this machine stay here
        values[key] = values[key] and Path(values[key]).name
    changed = [(key, _value(value)) for key, value in values.items() if defaults.get(key) != value]
    every = [(key, _value(value)) for key, value in values.items()]
    notes = "".join(page.paragraph(note) for note in record.notes)
    return page.section(
        "Settings",
        page.table(["setting", "value"], changed, "Settings that differ from the defaults"),
        page.folded("all settings", page.table(["setting", "value"], every, "All settings of the run")),
    ) + page.section("What training chose by itself", notes)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
