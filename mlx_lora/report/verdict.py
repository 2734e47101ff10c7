"""What a verdict's record says, as sections of a report: the sentence, differences with intervals, drift, examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlx_lora.report import page
from mlx_lora.report.sample import Sample
from mlx_lora.report.svg import Figures, Interval
from mlx_lora.store.verdict import Judged

ANEW = "Answers here were generated anew; a verdict on labels goes by their likelihood, and may differ."
DRIFT = {
    "kl_task": "KL from the base on the task's rows, nats a token",
    "kl_general": "KL from the base on general text, nats a token",
    "loss_general_base": "loss of the base on general text, nats",
    "loss_general_tuned": "loss of the adapter on general text, nats",
}


def sections(results: Sequence[Judged], samples: Sequence[Sample], figures: Figures, note: str = "") -> str:
    """The part of a report that is about a verdict. `samples` are rows that were fixed or broken."""
    if not results:
        return ""
    sentences = [page.paragraph(f"{each.adapter}: {each.sentence}", "lead") for each in results]
    rows = [
        (r.adapter, r.metric, r.base, r.tuned, r.difference, _span(r.interval), r.rows, r.fixed, r.broken)
        for r in results
    ]
    headers = ["adapter", "metric", "base", "adapter's", "difference", "95 % interval", "rows", "fixed", "broken"]
    table = page.table(headers, rows, "Base and adapter")
    anew = ANEW if samples else ""
    return (
        page.section("Verdict", *sentences, _intervals(results, figures), table, _losses(results))
        + page.section("What changed elsewhere", _drift(results), _behaviour(results))
        + page.section("Rows that changed", page.paragraph(note or anew, "soft"), *_examples(results, samples))
    )


def _count(rows: int) -> str:
    return f"{rows} row{'s' if rows != 1 else ''}"


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}"


def _intervals(results: Sequence[Judged], figures: Figures) -> str:
    """A figure for each metric: differences of different units have no common axis."""
    drawn = []
    for metric in dict.fromkeys(result.metric for result in results):
        intervals = [
            Interval(r.adapter, r.interval[0], r.difference, r.interval[1])
            for r in results
            if r.metric == metric and all(map(math.isfinite, (*r.interval, r.difference)))
        ]
        if intervals:
            title = f"Difference of {metric} between adapter and base"
            svg = figures.intervals(intervals, title=title, across=f"adapter − base, {metric}, 95 % interval")
            drawn.append(page.figure(svg, "An interval on one side of zero tells helped and hurt apart."))
    return "".join(drawn)


def _losses(results: Sequence[Judged]) -> str:
    """The losses beside the score that a verdict went by."""
    rows = [
        (r.adapter, r.loss.base, r.loss.tuned, r.loss.difference, _span(r.loss.interval)) for r in results if r.loss
    ]
    headers = ["adapter", "base", "adapter's", "difference", "95 % interval"]
    return page.table(headers, rows, "A second opinion: loss on the same rows, nats a token")


def _behaviour(results: Sequence[Judged]) -> str:
    """Shares of answers that do something, of base and adapter, on the task's prompts and on general ones."""
    rows = []
    for result in results:
        for prompts, sides in result.behaviour.items():
            base, tuned = sides.get("base", {}), sides.get("tuned", {})
            for what in dict.fromkeys([*base, *tuned]):
                name = f"{result.adapter}, {prompts} prompts: {what.replace('_', ' ')}"
                rows.append((name, base.get(what), tuned.get(what)))
    return page.table(["answers", "base", "adapter"], rows, "How answers are")


def _drift(results: Sequence[Judged]) -> str:
    measured = {key: [getattr(result.drift, key) for result in results] for key in DRIFT}
    rows = [(DRIFT[key], *values) for key, values in measured.items() if any(value is not None for value in values)]
    return page.table(["measure", *(result.adapter for result in results)], rows, "Drift from the base")


def _examples(results: Sequence[Judged], samples: Sequence[Sample]) -> list[str]:
    """Samples of fixed rows, then of broken ones, and the numbers of all of them."""
    parts = []
    for result in results:
        for name, numbers in (("Fixed", result.fixed_rows), ("Broken", result.broken_rows)):
            if not numbers:
                continue
            shown = [sample.html() for sample in samples if sample.row in numbers and result.adapter in sample.answers]
            parts.append(f"<h3>{page.text(f'{name} by {result.adapter}: {_count(len(numbers))}')}</h3>")
            parts += shown
            listed = page.paragraph(", ".join(str(number + 1) for number in numbers))
            parts.append(page.folded("numbers of these rows in the file, from 1", listed))
    return parts
